"""Write the figures of README.md from `evals/results/`, between its markers; ``--check`` only compares.

python evals/render_readme.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
README = TOP / "README.md"
_LABELS = {
    "bits_per_dim": "test bits/dim (359 images, 8 dequantisation draws, labels given)",
    "gaussian_bits_per_dim": "the same of a full-covariance Gaussian fitted to the training images",
    "frechet_pixels": "Fréchet distance on pixels, 1,000 generated images to all training images",
    "gaussian_frechet_pixels": "the same of samples of that Gaussian",
    "real_frechet_pixels": "the same of 1,000 real training images",
    "label_agreement": "generated images in which a classifier sees the label asked for",
    "accuracy_on_real_test": "accuracy of that classifier on the real test split",
    "train_images_per_second": "training speed",
    "train_peak_memory": "peak resident memory of a training rank",
    "seconds_prepare": "seconds: prepare",
    "seconds_train": "seconds: train",
    "seconds_evaluate": "seconds: evaluate",
    "seconds_promote": "seconds: promote",
    "seconds_generate": "seconds: generate",
    "seconds_label_agreement": "seconds: label agreement",
    "seconds_total": "seconds: all",
}


def number(value: float, unit: str) -> str:
    """As many digits as the unit deserves."""
    match unit:
        case "bits/dim":
            return f"{value:.3f} {unit}"
        case "s" | "images/s":
            return f"{value:.0f} {unit}"
        case _ if unit.startswith("fraction"):
            return f"{value:.1%}"
        case _ if unit.startswith("levels"):
            return f"{value:.1f}"
        case _:
            return f"{value:.2f} {unit}"


def demo_table(results: dict[str, Any]) -> str:
    """The table of the demo."""
    versions = results["versions"]
    head = (
        f"Measured on {results['device']} with torch {versions['torch']}, deepspeed {versions['deepspeed']} and ray "
        f"{versions['ray']} on {results['date']}, by `{results['command']}`\n"
        f"([evals/results/demo-cpu.json](evals/results/demo-cpu.json) has seeds, counts and protocol ids).\n\n"
    )
    figures = results["figures"]
    rows = [
        f"| {label} | {number(figures[name]['got'], figures[name]['unit'])} | {figures[name]['asked']} |"
        for name, label in _LABELS.items()
    ]
    return head + "\n".join(["| figure | got | asked |", "|---|---|---|", *rows])


def main() -> None:
    """Render or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when README.md differs from the results")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    results = json.loads((TOP / "evals/results/demo-cpu.json").read_text(encoding="utf-8"))
    block = f"<!-- demo:begin -->\n{demo_table(results)}\n<!-- demo:end -->"
    after = re.sub(r"<!-- demo:begin -->.*<!-- demo:end -->", lambda _: block, before, flags=re.DOTALL)
    if check and before != after:
        sys.exit("README.md differs from evals/results; run: python evals/render_readme.py")
    if not check:
        README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
