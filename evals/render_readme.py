"""Write the figures of README.md from `evals/results/`, between its markers; ``--check`` only compares.

python evals/render_readme.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from readme_models import (
    anomaly_table,
    capacity_line,
    classification_line,
    dequantization_line,
    family_table,
    got_of,
    mnist_table,
    vectors_table,
)

TOP = Path(__file__).resolve().parents[1]
README = TOP / "README.md"
_LABELS = {
    "bits_per_dim": "test bits/dim (359 images, 8 dequantization draws, labels given)",
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
    "seconds_report": "seconds: report",
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


def _results(name: str) -> dict[str, Any]:
    return json.loads((TOP / "evals/results" / f"{name}.json").read_text(encoding="utf-8"))


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


def speed_table(training: dict[str, Any], short: dict[str, Any], memory: dict[str, Any]) -> str:
    """Ratios of the benchmarks."""
    rows = [
        ("TarFlow step, 1,024 tokens, bf16 autocast, over apple/ml-tarflow's", training, "speed_bf16_over_public_bf16"),
        ("the same in fp32", training, "speed_fp32_over_public_fp32"),
        ("the same at 256 tokens, bf16", short, "speed_bf16_over_public_bf16"),
        ("the same at 256 tokens, fp32", short, "speed_fp32_over_public_fp32"),
        ("TarFlow step, bf16, over apple/ml-tarflow's fp32", training, "speed_bf16_over_public_fp32"),
        ("this processor's bf16 matrix product over its fp32", training, "matmul_bf16_over_fp32"),
        ("memory, checkpointed over theirs, 256 tokens, fp32", short, "memory_checkpointed_fp32_over_public_fp32"),
        ("the same in bf16", short, "memory_checkpointed_bf16_over_public_bf16"),
        ("memory, checkpointed over theirs, 1,024 tokens, fp32", training, "memory_checkpointed_fp32_over_public_fp32"),
        ("the same in bf16", training, "memory_checkpointed_bf16_over_public_bf16"),
        ("Glow memory, activations rebuilt, 32 steps a level over 8", memory, "memory_rebuilt_32_over_8"),
        ("Glow memory, activations rebuilt over kept, 32 steps", memory, "memory_rebuilt_over_kept_32"),
        ("Glow time, activations rebuilt over kept, 32 steps", memory, "time_rebuilt_over_kept_32"),
        ("Glow 256x256 recipe, one image a step, whole process", memory, "recipe_256_peak_memory"),
    ]  # fmt: skip
    return _ratio_table(training, rows)


def data_table(loader: dict[str, Any], fuzz: dict[str, Any]) -> str:
    """Ratios of the loader, and what became of damaged data sets."""
    rows = [
        ("64 px PNG, over a loop that decodes from memory as Pillow's documentation shows", "png64_over_bare"),
        ("the same loop with our decoder", "png64_over_our_decoder"),
        ("512 px JPEG, over such a loop", "jpeg512_over_bare"),
        ("the same loop with our decoder", "jpeg512_over_our_decoder"),
        ("64 px PNG, over plain webdataset, no worker processes", "png64_over_webdataset_0_workers"),
        ("the same with two", "png64_over_webdataset_2_workers"),
        ("512 px JPEG, over plain webdataset, no worker processes", "jpeg512_over_webdataset_0_workers"),
        ("the same with two", "jpeg512_over_webdataset_2_workers"),
        ("64 px PNG from S3, 30 ms a request, over local files", "png64_s3_over_local"),
        ("512 px JPEG from S3, 30 ms a request, over local files", "jpeg512_s3_over_local"),
        ("a million samples: seconds to the first batch from the middle", "million_seconds_to_first_batch"),
        ("the same: memory that is added", "million_added_memory"),
        ("bytes read to resume, over one block a slot", "resume_bytes_over_a_block_per_slot"),
    ]
    outcome = {name: f"{one['got']:.0f}" for name, one in fuzz["figures"].items()}
    return (
        f"{_ratio_table(loader, [(label, loader, name) for label, name in rows])}\n\n"
        f"Of {outcome['trials']} data sets in which a file was damaged at random (bits flipped, bytes zeroed or "
        f"inserted, cut, deleted,\nswapped; before opening or while open), {outcome['quarantined']} were read with the "
        f"bad samples replaced, {outcome['clear_error']} ended in one clear line,\n{outcome['no_effect']} read as "
        f"before, {outcome['read_as_packed']} had checksums that agreed with the damage; crashes, hangs and wrong "
        f"pixels: {outcome['crashes_hangs_wrong_pixels']}."
    )


def training_table(training: dict[str, Any], faults: dict[str, Any]) -> str:
    """Overheads, and what became of disturbed runs."""
    rows = [
        ("a step of the engine at ZeRO 0, over plain PyTorch, one rank", "engine_stage_0_over_bare"),
        ("the same at ZeRO 2", "engine_stage_2_over_bare"),
        ("ZeRO 2 with two moving averages, over none", "two_averages_over_none"),
        ("a step after a validation, over one before", "step_after_validation_over_before"),
        ("ten steps with an upload of the checkpoint, over ten without", "upload_over_none_per_checkpoint"),
        ("a step while a checkpoint is uploaded, over one without", "step_during_upload_over_without"),
        ("a moving average, a parameter, on all ranks together", "average_bytes_per_parameter"),
        ("a checkpoint of 133 MB stops training for", "checkpoint_stall"),
    ]
    lines = _fault_lines(faults, "fault, then the same command again")
    return (
        f"{_ratio_table(training, [(label, training, name) for label, name in rows])}\n\n"
        f"Survived means: log and weights are those of a run that nothing disturbed, to the last bit (to 1e-5 bits/dim "
        f"where\nranks and stages change), which they are only if no sample is lost or seen twice. Measured on "
        f"{faults['date']}.\n\n" + "\n".join(lines)
    )


def sampling_table(
    exact: dict[str, Any], long: dict[str, Any], attention: dict[str, Any], adaptive: dict[str, dict[str, Any]]
) -> str:
    """Ratios to the public sampler, and what several tokens at once gain on trained models."""
    rows = [
        ("guided, over apple/ml-tarflow's sampler, 256 tokens, fp32", exact, "guided_over_public"),
        ("without guidance", exact, "unguided_over_public"),
        ("guided, ours in bf16 over theirs in fp32", exact, "guided_bf16_over_public_fp32"),
        ("without guidance, ours in bf16 over theirs in fp32", exact, "unguided_bf16_over_public_fp32"),
        ("guided, 1,024 tokens, fp32", long, "guided_over_public"),
        ("the same without guidance", long, "unguided_over_public"),
        ("guided, 1,024 tokens, ours in bf16 over theirs in fp32", long, "guided_bf16_over_public_fp32"),
        ("attention of one token, fp32, over PyTorch's", attention, "fp32_over_pytorch"),
        ("the same in bf16", attention, "bf16_over_pytorch"),
        ("largest difference of a pixel from theirs, guided", exact, "guided_largest_difference"),
        ("memory of the cache over the arithmetic", exact, "cache_over_arithmetic"),
        ("the time to read weights and cache at this memory's bandwidth, over ours", exact, "guided_fraction_of_floor"),
    ]
    lines = [
        "| several tokens at once, trained model | batch | over exact | largest error | pixels within one level |",
        "|---|---|---|---|---|",
    ]
    for label, results in adaptive.items():
        figures = {name: one["got"] for name, one in results["figures"].items()}
        lines.append(
            f"| {label} | {results['batch']} | {figures['adaptive_over_exact']:.2f} | {figures['max_error']:.1e} | "
            f"{figures['pixels_within_one_level']:.3%} |"
        )
    head = _ratio_table(exact, rows)
    return f"{head}\n\n" + "\n".join(lines)


def evaluation_table(measured: dict[str, Any], faults: dict[str, Any]) -> str:
    """What evaluation costs, and what became of disturbed ones."""
    rows = [
        ("extraction of Inception features, over torch-fidelity's loop", "extraction_over_torch_fidelity"),
        ("merging moments, over extraction", "merging_over_extraction"),
        ("an extractor-bound job, two workers over one", "two_workers_over_one"),
        ("what one worker and two found differs by", "one_worker_and_two_differ_by"),
        (
            "the driver's memory, 20,000 samples of 2,048 features over 1,000",
            "wide_driver_memory_20000_samples_over_1000",
        ),
    ]
    head = _ratio_table(measured, [(label, measured, name) for label, name in rows])
    return f"{head}\n\n" + "\n".join(_fault_lines(faults, "fault; every number must be the same to the last bit"))


def registry_table(measured: dict[str, Any], faults: dict[str, Any]) -> str:
    """What a registry costs, and what became of disturbed ones."""
    rows = [
        ("`models list` of 1,000 versions and 10,000 events, no snapshot, start of Python included", "cold_list"),
        ("the same with the snapshot", "list_with_snapshot"),
        ("reading the state alone with the snapshot", "state_with_snapshot"),
        ("store requests of an event", "requests_of_an_event"),
    ]
    head = _ratio_table(measured, [(label, measured, name) for label, name in rows], "figure")
    lines = _fault_lines(faults, "fault; nothing lost, nothing doubled, the old champion always readable")
    return f"{head}\n\n" + "\n".join(lines)


def generation_table(measured: dict[str, Any], fast: dict[str, Any], faults: dict[str, Any]) -> str:
    """What generation adds to sampling, and what became of disturbed ones."""
    rates = [f"{one['figures']['images_per_second']['got']:,.0f} images/s" for one in (measured, fast)]
    rows = [
        (f"a shard of 1,000 MNIST images, at {rates[0]}, over sampling them alone", measured, "shard_over_sampling"),
        (f"a shard of 1,000 digits, at {rates[1]}", fast, "shard_over_sampling"),
        ("encoding the MNIST images as PNG, over sampling them", measured, "encoding_over_sampling"),
    ]
    head = _ratio_table(measured, rows)
    lines = _fault_lines(faults, "fault, 10,000 digits; every file must be the same, byte for byte")
    return f"{head}\n\n" + "\n".join(lines)


def slurm_table(faults: dict[str, Any]) -> str:
    """What jobs of a real Slurm survived."""
    lines = _fault_lines(faults, "job of Slurm, two nodes; weights, logs and files must be equal to the last bit")
    return f"Measured on {faults['date']} with {faults['scheduler']}.\n\n" + "\n".join(lines)


def augmentation_line(results: dict[str, Any]) -> str:
    """What generated images did to the likelihood of real ones."""
    got = got_of(results)
    return (
        f"What it did on the digits, one run and one seed: with {results['share']:.0%} of every batch generated by the "
        f"demo's champion,\nthe test split costs {got['bits_per_dim_with']:.3f} bits/dim, without "
        f"{got['bits_per_dim_without']:.3f} (image by image {got['difference']:+.3f} ± "
        f"{got['difference_standard_error']:.3f}); the Fréchet\ndistance of samples is "
        f"{got['frechet_pixels_with']:.1f} with and {got['frechet_pixels_without']:.1f} without. "
        f"`{results['command']}`"
    )


def champions_table(champions: list[dict[str, Any]]) -> str:
    """The newest report of every champion, as its registry holds it."""
    lines = [
        "| champion | trained on | number | value | standard error | unit | images | protocol id |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in champions:
        version, report = one["version"], one["report"]
        name = f"{report['model']}@{version['version']}, {version['parameters'] / 1e6:.2f} M parameters"
        for metric in report["metrics"].values():
            lines.append(
                f"| {name} | {version['images_seen']:,} images | {metric['protocol']} | {metric['value']:.4f} | "
                f"{metric['standard_error']:.4f} | {metric['unit']} | {metric['num_images']:,} | "
                f"`{metric['protocol_id'][:12]}` |"
            )
    return "\n".join(lines)


def shown(text: str) -> str:
    """What a command printed."""
    return f"```\n{text.rstrip()}\n```"


def _fault_lines(faults: dict[str, Any], heading: str) -> list[str]:
    """A table of faults; cases are those of all runs together."""
    lines = [f"| {heading} | runs | survived |", "|---|---|---|"]
    for name, description in faults["faults"].items():
        figure, cases = faults["figures"][name], faults["figures"].get(f"{name}_cases")
        number = "" if cases is None else f" ({cases['got']:.0f} cases)"
        lines.append(f"| {description.rstrip('.')}{number} | {figure['asked']} | {figure['got']:.0f} |")
    return lines


def _ratio_table(
    measured: dict[str, Any], rows: list[tuple[str, dict[str, Any], str]], what: str = "ratio, both sides in one run"
) -> str:
    """Rows of label, results and figure; the heading is that of ``measured``."""
    lines = [f"| {what} | got | asked |", "|---|---|---|"]
    for label, results, name in rows:
        figure = results["figures"][name]
        unit = "" if figure["unit"] in ("times", "of it") else f" {figure['unit']}"
        got = f"{figure['got']:.3f}" if figure["got"] >= 0.001 or not figure["got"] else f"{figure['got']:.1e}"
        lines.append(f"| {label} | {got}{unit} | {figure['asked']} |")
    return (
        f"Measured on {measured['date']} on {measured['device']}, torch {measured['versions']['torch']}.\n\n"
        + "\n".join(lines)
    )


def main() -> None:
    """Render or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when README.md differs from the results")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = before
    for name, text in {
        "demo": demo_table(_results("demo-cpu")),
        "mnist": mnist_table(_results("mnist-cpu"), _results("mnist-family-cpu")),
        "speed": speed_table(
            _results("tarflow-training-cpu-1024-tokens"), _results("tarflow-training-cpu"), _results("glow-memory-cpu")
        ),
        "training": training_table(_results("training-cpu"), _results("faults-cpu")),
        "sampling": sampling_table(
            _results("sampling-cpu"),
            _results("sampling-1024-tokens-cpu"),
            _results("one-query-cpu"),
            {
                "digits (demo)": _results("adaptive-digits-cpu"),
                "the same alone": _results("adaptive-digits-single-cpu"),
                "MNIST": _results("adaptive-mnist-cpu"),
                "MNIST alone": _results("adaptive-mnist-single-cpu"),
            },
        ),
        "evaluation": evaluation_table(_results("evaluation-cpu"), _results("evaluation-faults-cpu")),
        "champions": champions_table(
            [_results(f"champion-{name}") for name in ("digits", "mnist-glow", "mnist-tarflow")]
        ),
        "registry": registry_table(_results("registry-cpu"), _results("registry-faults-cpu")),
        "generation": generation_table(
            _results("generation-cpu"), _results("generation-digits-cpu"), _results("generation-faults-cpu")
        ),
        "classification": classification_line(_results("classification-digits-cpu")),
        "family": family_table(_results("family-cpu")),
        "dequantization": dequantization_line(_results("dequantization-cpu")),
        "vectors": vectors_table(_results("vectors-cpu")),
        "anomaly": anomaly_table(
            [_results(f"anomaly-{name}-cpu") for name in ("digits", "mnist-glow", "mnist-tarflow")]
        ),
        "augmentation": augmentation_line(_results("augmentation-cpu")),
        "slurm": slurm_table(_results("slurm-cpu")),
        "capacity": capacity_line(_results("capacity-cpu")),
        "show": shown((TOP / "evals/results/models-show.txt").read_text(encoding="utf-8")),
        "data": data_table(_results("loader-cpu"), _results("fuzz-shards-cpu")),
    }.items():
        block = f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->"
        after = re.sub(rf"<!-- {name}:begin -->.*<!-- {name}:end -->", lambda _, b=block: b, after, flags=re.DOTALL)
    if check and before != after:
        sys.exit("README.md differs from evals/results; run: python evals/render_readme.py")
    if not check:
        README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
