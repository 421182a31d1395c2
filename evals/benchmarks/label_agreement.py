"""Share of generated images that a classifier, trained on real digits, assigns to their label.

The classifier is a support vector machine on the flattened levels of the real training split. Its accuracy on the real
test split is printed too, as an upper bound of what to expect.

    python evals/benchmarks/label_agreement.py --data runs/demo/data --generated runs/demo/generated --output FILE
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC

from tarflow_scale.shards.reader import ShardSet


def levels_and_labels(path: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Every image of a data set as levels ``(n, D)``, and its label ``(n,)``."""
    shards = ShardSet(path)
    batches = list(shards.batches(0, shards.manifest.num_images, 500))
    images = np.concatenate([batch.events for batch in batches])
    levels = (images >> (8 - shards.manifest.bit_depth)).astype(np.uint8).reshape(len(images), -1)
    return levels, np.concatenate([batch.labels for batch in batches])


def main() -> None:
    """Train, score, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--generated", required=True, help="folder of generated shards")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    classifier = SVC(gamma=0.001, C=10.0)  # pyright: ignore[reportArgumentType] - its stub knows only "scale"
    classifier.fit(*levels_and_labels(f"{arguments.data}/train"))
    on_real = float(classifier.score(*levels_and_labels(f"{arguments.data}/test")))
    levels, labels = levels_and_labels(arguments.generated)
    agreement = float(classifier.score(levels, labels))
    found = {"label_agreement": agreement, "num_images": len(labels), "accuracy_on_real_test": on_real}
    arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"label agreement {agreement:.3f} on {len(labels)} generated images ({on_real:.3f} on the real test split)")


if __name__ == "__main__":
    main()
