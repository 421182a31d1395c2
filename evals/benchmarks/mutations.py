"""Whether the fast tests notice a wrong line: one line at a time is changed in a copy of the package.

    python evals/benchmarks/mutations.py

Prints each mutation with the test that failed. The exit code is 1 if a mutation was not noticed. The tests are those
that `make test` runs of the files that are named; without a mutation they must pass.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
COPIED = ("tarflow_scale", "tests", "evals", "configs", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Mutation:
    """A line of the package, the wrong line in its place, and the tests that must notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "order: a slot begins within the stretch of the slot before it",
        "shards/order.py",
        "return starts + self.slot * steps_per_epoch(self.spec)",
        "return starts + self.slot * (steps_per_epoch(self.spec) - 1)",
        ("tests/shards/test_order.py",),
    ),
    Mutation(
        "log-det: the sign of the last scale of a TarFlow",
        "flows/tarflow.py",
        "log_det = log_det - self.log_std.sum()",
        "log_det = log_det + self.log_std.sum()",
        ("tests/flows/test_tarflow.py", "tests/flows/test_conformance.py"),
    ),
    Mutation(
        "log-det: a 1x1 convolution counts rows in place of pixels",
        "flows/coupling.py",
        "(log_det * (x.shape[2] * x.shape[3])).expand(len(x))",
        "(log_det * x.shape[2]).expand(len(x))",
        ("tests/flows/test_coupling.py", "tests/flows/test_conformance.py"),
    ),
    Mutation(
        "checkpoint: averages are restored from the weights",
        "training/checkpoint.py",
        "_of_kind(tensors, _average_kind(averages, half_life))",
        '_of_kind(tensors, "weight")',
        ("tests/training/test_engine.py::test_a_checkpoint_restores_at_any_stage_and_number_of_ranks",),
    ),
    Mutation(
        "registry: a writer that lost the race for an event believes that it won",
        "registry/registry.py",
        "or storage.read_bytes(location) == content:",
        "or storage.exists(location):",
        ("tests/registry/test_registry.py",),
    ),
    Mutation(
        "registry: events need not follow the digest of the one before",
        "registry/log.py",
        "if event.number != number or event.previous != previous:",
        "if event.number != number:",
        ("tests/registry/test_registry.py", "tests/registry/test_state.py"),
    ),
    Mutation(
        "gate: a candidate wins by chance",
        "registry/gate.py",
        "limit > requirement.margin",
        "gain > requirement.margin",
        ("tests/registry/test_gate.py",),
    ),
    Mutation(
        "bound: the density of a drawn latent has no training noise",
        "autoencoders/rendering.py",
        "centre, log_var = latent.widened(noise_std * scale.flatten())",
        "centre, log_var = latent",
        ("tests/metrics/test_bound.py",),
    ),
)


def failed_test(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first of the fast tests that fails in a copy, or None; anything else that happens ends the script."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    failures = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if result.returncode not in (0, 1) or bool(failures) != bool(result.returncode):
        sys.exit(f"the tests did not run:\n{result.stdout}{result.stderr}")
    return failures[0].split(" - ")[0] if failures else None


def copy_of_checkout(folder: Path) -> None:
    """The package with its tests, without what they do not need."""
    for name in COPIED:
        if (TOP / name).is_dir():
            shutil.copytree(TOP / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(TOP / name, folder / name)


def main() -> None:
    unnoticed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_checkout(folder)
        if failure := failed_test(folder, tuple(dict.fromkeys(test for one in MUTATIONS for test in one.tests))):
            sys.exit(f"a test fails without a mutation: {failure}")
        for mutation in MUTATIONS:
            file = folder / "tarflow_scale" / mutation.file
            content = file.read_text()
            if content.count(mutation.right) != 1:
                sys.exit(f"{mutation.file} must have this once (got {content.count(mutation.right)}): {mutation.right}")
            file.write_text(content.replace(mutation.right, mutation.wrong))
            failure = failed_test(folder, mutation.tests)
            file.write_text(content)
            unnoticed += failure is None
            print(f"{mutation.name}: {failure or 'NOT NOTICED'}", flush=True)
    print(f"{len(MUTATIONS) - unnoticed} of {len(MUTATIONS)} mutations were noticed")
    sys.exit(int(unnoticed > 0))


if __name__ == "__main__":
    main()
