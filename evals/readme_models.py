"""What README.md says of models, from evals/results; `render_readme.py` puts it there."""

from typing import Any

__all__ = [
    "anomaly_table",
    "capacity_line",
    "classification_line",
    "dequantization_line",
    "family_table",
    "got_of",
    "mnist_table",
    "vectors_table",
]


def capacity_line(measured: dict[str, Any]) -> str:
    """How far the planner is off, over all cases that were measured."""

    def off(kind: str) -> tuple[int, float]:
        ratios = [figure["got"] for name, figure in measured["figures"].items() if name.endswith(kind)]
        return len(ratios), max(abs(ratio - 1) for ratio in ratios)

    def seconds(*names: str) -> list[float]:
        return sorted(measured["figures"][f"{name}_seconds"]["got"] for name in names)

    (cases, memory), (exchanges, traffic) = off("_memory"), off("_bytes")
    plain = seconds("tarflow_checkpoint", "tarflow_checkpoint_bf16", "tarflow_stage0")
    sharded = seconds(
        "tarflow_stage1_accumulating", "large_stage2", "large_stage2_bf16", "large_stage2_accumulating", "large_stage3"
    )
    glow = seconds("glow_keep", "glow_checkpoint", "glow_rebuild")
    return (
        f"Memory that it foretells is within {memory:.0%} of the peak of a rank in {cases} cases: "
        "TarFlows of 51 and\n114 million parameters and a Glow of 22, ZeRO 0 to 3, fp32 and bf16 (asked: 15%). Traffic "
        f"of two gloo ranks is within\n{traffic:.1%} in {exchanges} cases. The time of a step, from the utilisation of "
        f"another one, is within {max(abs(one - 1) for one in plain):.0%} for TarFlows on one\nrank and on two "
        f"at stage 0. At stages 1 to 3 it foretells {sharded[0]:.2f} to {sharded[-1]:.2f} of the time, since CPU ranks "
        f"copy and sum with the cores\nthat compute; and {glow[0]:.2f} to {glow[-1]:.2f} of a Glow's, whose "
        f"utilisation is another. Measured on {measured['date']} on {measured['device']}.\nOn no GPU was speed "
        "checked. `python evals/benchmarks/capacity.py --output evals/results/capacity-cpu.json`"
    )


def got_of(results: dict[str, Any]) -> dict[str, float]:
    """Figures of a results file by name."""
    return {name: one["got"] for name, one in results["figures"].items()}


def mnist_table(results: dict[str, Any], family: dict[str, Any]) -> str:
    """Bits/dim of all models, and the published ones."""
    rows = [
        *(_mnist_row(results, model, label) for model, label in (("tarflow", "TarFlow"), ("glow", "Glow"))),
        *(_mnist_row(family, key, name) for key, name in (("realnvp", "RealNVP"), ("maf", "MAF"), ("nice", "NICE"))),
    ]
    figures = results["figures"]
    published = ", ".join(
        f"{label} {figures[f'published_{key}']['got']:.2f}"
        for key, label in (("ffjord", "FFJORD"), ("glow", "Glow"), ("realnvp", "RealNVP"), ("maf", "MAF"))
    )
    head = (
        f"Measured on {results['date']} with torch {results['versions']['torch']}, seed 0, protocols "
        f"`{results['protocol_ids']['bits_per_dim'][:12]}` and `{results['protocol_ids']['bits_per_dim_iw8'][:12]}` "
        f"([evals/results/mnist-cpu.json](evals/results/mnist-cpu.json)); RealNVP, MAF and NICE on "
        f"{family['date']}, shorter runs "
        f"([evals/results/mnist-family-cpu.json](evals/results/mnist-family-cpu.json)).\n\n"
    )
    header = [
        "| MNIST, 10,000 test images | bits/dim, mean of 4 draws | importance-weighted, 8 draws | budget |",
        "|---|---|---|---|",
    ]
    return head + "\n".join([*header, *rows, f"| published: {published} | | | |"])


def _mnist_row(results: dict[str, Any], model: str, label: str) -> str:
    figures = results["figures"]
    got = {key.removeprefix(f"{model}_"): one["got"] for key, one in figures.items() if key.startswith(f"{model}_")}
    epochs = results["counts"][f"{model}_images_seen"] / 60_000
    return (
        f"| {label}, {got['parameters']:.2f} M parameters | {got['bits_per_dim']:.3f} "
        f"(± {got['bits_per_dim_standard_error']:.3f}) | {got['bits_per_dim_iw8']:.3f} | "
        f"{epochs:.1f} epochs, {got['training_hours']:.1f} h of one CPU core |"
    )


def family_table(results: dict[str, Any]) -> str:
    """Every model of the family on one data set, the best first."""
    got = got_of(results)
    names = {
        "nice": "NICE", "realnvp": "RealNVP", "maf": "MAF", "iaf": "IAF", "glow": "Glow", "continuous": "continuous",
        "tarflow": "TarFlow",
    }  # fmt: skip
    rows: list[tuple[float, str]] = []
    for name in results["models"]:
        of = {what.removeprefix(f"{name}_"): value for what, value in got.items() if what.startswith(f"{name}_")}
        rows.append(
            (
                of["bits_per_dim"],
                f"| {names[name]} | {of['bits_per_dim']:.3f} (± {of['bits_per_dim_standard_error']:.3f}) | "
                f"{of['frechet_pixels']:.1f} | {of['parameters'] / 1e3:.0f} k | {of['trained_per_second']:,.0f} | "
                f"{of['sampled_per_second']:,.0f} |",
            )
        )
    gaussian = got["gaussian_bits_per_dim"]
    distance = got["gaussian_frechet_pixels"]
    rows.append((gaussian, f"| full-covariance Gaussian | {gaussian:.3f} | {distance:.1f} | | | |"))
    rows.append((got["uniform_bits_per_dim"], f"| uniform | {got['uniform_bits_per_dim']:.3f} | | | | |"))
    on: dict[str, list[str]] = {}
    for name, where in results["measured"].items():
        on.setdefault(f"{where['device']} on {where['date']}", []).append(names[name])
    where = "; ".join(f"{', '.join(several)} on {place}" for place, several in on.items())
    ids = " and ".join(f"`{one[:12]}`" for one in results["protocol_ids"].values())
    head = (
        f"Measured by `python evals/benchmarks/family.py --output evals/results/family-cpu.json`, protocols {ids}.\n"
        f"Speeds compare within a machine: {where}.\n\n"
    )
    header = [
        "| 359 test images | bits/dim | Fréchet distance on pixels | parameters | images/s, training | sampling |",
        "|---|---|---|---|---|---|",
    ]
    return head + "\n".join([*header, *(row for _, row in sorted(rows))])


def vectors_table(results: dict[str, Any]) -> str:
    """Every flow of vectors on two moons, the best first."""
    got = got_of(results)
    names = {"maf": "MAF", "iaf": "IAF", "nice": "NICE", "realnvp": "RealNVP", "continuous": "continuous"}
    rows = [(got[f"{key}_nats"], f"{got[f'{key}_nats']:.3f} (± {got[f'{key}_nats_standard_error']:.3f})", name)
            for key, name in names.items() if f"{key}_nats" in got]  # fmt: skip
    rows.append((got["gaussian_nats"], f"{got['gaussian_nats']:.3f}", "full-covariance Gaussian"))
    lines = [f"| two moons, {results['points']['test']:,} held out | nats, no labels |", "|---|---|"]
    lines += [f"| {name} | {text} |" for _, text, name in sorted(rows)]
    return (
        f"Measured on {results['date']} by `{results['command']}`, {results['images_seen']:,} points seen by each.\n\n"
        + "\n".join(lines)
    )


def dequantization_line(results: dict[str, Any]) -> str:
    """What learned noise did."""
    got = got_of(results)
    return (
        f"Measured on {results['date']}: the digits' RealNVP costs {got['learned_bits_per_dim']:.3f} bits/dim with it "
        f"and {got['uniform_bits_per_dim']:.3f} without (image by\nimage {got['difference']:+.3f} ± "
        f"{got['difference_standard_error']:.3f}; {results['images_seen']:,} images seen, "
        f"{got['learned_parameters'] / got['uniform_parameters'] - 1:.0%} more parameters, one seed).\n"
        f"`{results['command']}`"
    )


def anomaly_table(several: list[dict[str, Any]]) -> str:
    """AUROC of every score."""
    scores = ("likelihood", "complexity", "typicality", "likelihood_ratio")
    lines = [
        f"AUROC, measured on {several[0]['date']}; half of each test split calibrates, half is normal. Every score is "
        f"higher for what is more\nanomalous, so below 0.5 it has the direction wrong.\n",
        f"| model, against | {' | '.join(score.replace('_', ' ') for score in scores)} |",
        f"|---|{'---|' * len(scores)}",
    ]
    for results in several:
        got = got_of(results)
        kinds = [name.removesuffix("_likelihood_auroc") for name in got if name.endswith("_likelihood_auroc")]
        for kind in kinds:
            found = [got.get(f"{kind}_{score}_auroc") for score in scores]
            cells = ["" if value is None else f"{value:.3f}" for value in found]
            lines.append(f"| {results['model']}, {kind.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def classification_line(results: dict[str, Any]) -> str:
    """How many labels the likelihoods get right."""
    got = got_of(results)
    return (
        f"By Bayes' rule the demo's champion, which was trained for likelihood alone, labels {got['accuracy']:.1%} "
        f"(± {got['accuracy_standard_error']:.1%}) of the\ntest digits right; asked: "
        f"{results['figures']['accuracy']['asked']}. `{results['command']}`"
    )
