"""Bits/dim of the MNIST models beside published figures, from the output of `train` and `evaluate`.

tarflow-scale prepare configs/prepare/mnist.yaml source.path=my/mnist.npz
tarflow-scale train configs/train/mnist-tarflow.yaml
tarflow-scale train configs/train/mnist-glow.yaml
tarflow-scale evaluate configs/evaluate/mnist.yaml
tarflow-scale evaluate configs/evaluate/mnist.yaml registry.model=mnist-glow
python evals/benchmarks/mnist_summary.py --output evals/results/mnist-cpu.json

For the other, shorter runs, the same with mnist-realnvp, mnist-nice and mnist-maf, and at the end

python evals/benchmarks/mnist_summary.py --models realnvp nice maf --output evals/results/mnist-family-cpu.json
"""

import argparse
import json
from pathlib import Path

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.registry import Registry

MODELS = ("tarflow", "glow")
PUBLISHED = {"realnvp": 1.06, "glow": 1.05, "ffjord": 0.99, "maf": 1.89}
"""Bits/dim as the FFJORD paper (arXiv 1810.01367, table 2) lists them; each on its own dequantization and budget."""


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist"), help="folder of the runs and their registry")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="which")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    figures: dict[str, Figure] = {}
    protocol_ids: dict[str, str] = {}
    commits: dict[str, str] = {}
    counts: dict[str, int] = {}
    for model in arguments.models:
        state = Registry(str(arguments.runs / "registry"), f"mnist-{model}").state()
        number = max(state.reports)
        version, report = state.versions[number], state.reports[number][-1]
        last = json.loads((arguments.runs / model / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        for name, metric in report.metrics.items():
            figures[f"{model}_{name}"] = ("", metric.value, "bits/dim")
            figures[f"{model}_{name}_standard_error"] = ("", metric.standard_error or 0.0, "bits/dim")
            protocol_ids[name] = metric.protocol_id
            counts[f"test_images_{name}"] = metric.num_images
        figures[f"{model}_parameters"] = ("", version.parameters / 1e6, "million")
        figures[f"{model}_training_hours"] = ("", last["seconds"] / 3600, "hours of one CPU core")
        figures[f"{model}_peak_memory"] = ("", last["peak_memory_bytes"] / 1024**3, "GiB")
        counts[f"{model}_images_seen"] = last["images"]
        commits[model] = version.git_commit
    figures |= {f"published_{name}": ("", value, "bits/dim") for name, value in PUBLISHED.items()}
    write_results(
        arguments.output,
        "cpu",
        figures,
        seeds={"training": 0, "protocols": 0},
        counts=counts,
        protocol_ids=protocol_ids,
        trained_at_commit=commits,
        training_commands={
            model: f"tarflow-scale train configs/train/mnist-{model}.yaml" for model in arguments.models
        },
    )


if __name__ == "__main__":
    main()
