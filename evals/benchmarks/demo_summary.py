"""Summarise the demo: print a table, write `summary.json` beside it, and on request the committed results file.

python evals/benchmarks/demo_summary.py runs/demo [--record]
"""

import argparse
import json
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console, provenance
from tarflow_scale.runtime.cores import num_cores
from tarflow_scale.shards.manifest import read_manifest

RESULTS = Path(__file__).resolve().parents[1] / "results" / "demo-cpu.json"


def summarise(folder: Path) -> dict[str, Any]:
    """The figures of the demo, read from the output of its stages."""
    state = Registry(str(folder / "registry"), "digits").state()
    champion = state.aliases["champion"]
    report = state.reports[champion][-1]
    agreement = json.loads((folder / "label_agreement.json").read_text())
    log = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    seconds = dict(line.split("\t") for line in (folder / "seconds.tsv").read_text().splitlines())
    return {
        "bits_per_dim": report.metrics["bits_per_dim"].value,
        "gaussian_bits_per_dim": report.baselines["gaussian_bits_per_dim"],
        "frechet_pixels": report.metrics["frechet_pixels"].value,
        "gaussian_frechet_pixels": report.baselines["gaussian_frechet_pixels"],
        "real_frechet_pixels": report.baselines["real_frechet_pixels"],
        "label_agreement": agreement["label_agreement"],
        "accuracy_on_real_test": agreement["accuracy_on_real_test"],
        "champion": f"digits@{champion}",
        "num_shards": len(read_manifest(str(folder / "generated")).shards),
        "num_images": read_manifest(str(folder / "generated")).num_images,
        "train_peak_memory_bytes": log[-1]["peak_memory_bytes"],
        "images_per_second": log[-1]["images_per_second"],
        "seconds": {name: float(value) for name, value in seconds.items()},
        "protocol_ids": {name: metric.protocol_id for name, metric in report.metrics.items()},
    }


def rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """What, got, asked."""
    gaussian_bits, gaussian_distance = summary["gaussian_bits_per_dim"], summary["gaussian_frechet_pixels"]
    total = sum(summary["seconds"].values())
    return [
        ("test bits/dim", f"{summary['bits_per_dim']:.3f}", f"<= {gaussian_bits - 0.6:.3f}"),
        ("  full-covariance Gaussian", f"{gaussian_bits:.3f}", ""),
        ("frechet_pixels", f"{summary['frechet_pixels']:.1f}", f"< {gaussian_distance / 2:.1f}"),
        ("  full-covariance Gaussian", f"{gaussian_distance:.1f}", ""),
        ("  1,000 real training images", f"{summary['real_frechet_pixels']:.1f}", ""),
        ("label agreement", f"{summary['label_agreement']:.1%}", ">= 90.0%"),
        ("champion", summary["champion"], ""),
        ("generated", f"{summary['num_images']} images in {summary['num_shards']} shards", ""),
        ("training", f"{summary['images_per_second']:.0f} images/s", ""),
        ("seconds", f"{total:.0f}", "<= 480"),
        *(
            (f"  {name}", f"{value:.0f}", "<= 300" if name == "train" else "")
            for name, value in summary["seconds"].items()
        ),
    ]


def record(summary: dict[str, Any], grid: Path) -> None:
    """Write the committed results file, and the picture beside it."""
    gaussian_bits, gaussian_distance = summary["gaussian_bits_per_dim"], summary["gaussian_frechet_pixels"]
    figures = {
        "bits_per_dim": (f"<= {gaussian_bits - 0.6:.4f}", summary["bits_per_dim"], "bits/dim"),
        "gaussian_bits_per_dim": ("", gaussian_bits, "bits/dim"),
        "frechet_pixels": (f"< {gaussian_distance / 2:.2f}", summary["frechet_pixels"], "levels of 4 bits, squared"),
        "gaussian_frechet_pixels": ("", gaussian_distance, "levels of 4 bits, squared"),
        "real_frechet_pixels": ("", summary["real_frechet_pixels"], "levels of 4 bits, squared"),
        "label_agreement": (">= 0.90", summary["label_agreement"], "fraction of 1,000"),
        "accuracy_on_real_test": ("", summary["accuracy_on_real_test"], "fraction"),
        "seconds_total": ("<= 480", sum(summary["seconds"].values()), "s"),
        **{f"seconds_{k}": ("<= 300" if k == "train" else "", v, "s") for k, v in summary["seconds"].items()},
        "train_images_per_second": ("", summary["images_per_second"], "images/s"),
        "train_peak_memory": ("< 4 GiB", summary["train_peak_memory_bytes"] / 1024**3, "GiB a rank"),
    }
    content = {
        "command": "rm -rf runs/demo && launch/quickstart.sh --record",
        "git_commit": provenance.git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{num_cores()} CPU cores, {platform.machine()}",
        "versions": provenance.package_versions(),
        "seeds": {"training": 0, "protocols": 0, "generation": 1},
        "counts": {"test_images": 359, "generated_for_the_distance": 1000, "generated_for_agreement": 1000},
        "protocol_ids": summary["protocol_ids"],
        "figures": {name: {"asked": a, "got": g, "unit": u} for name, (a, g, u) in figures.items()},
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(grid, RESULTS.with_suffix(".png"))
    print(f"wrote {RESULTS}")


def main() -> None:
    """Summarise, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the demo's folder")
    parser.add_argument("--record", action="store_true", help=f"also write {RESULTS.name}")
    arguments = parser.parse_args()
    summary = summarise(arguments.folder)
    (arguments.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(console.table(rows(summary), ("demo", "got", "asked")))
    print(f"\nsample grid: {arguments.folder}/generated/grid.png (column c holds digit c)")
    if arguments.record:
        record(summary, arguments.folder / "generated" / "grid.png")


if __name__ == "__main__":
    main()
