"""Shared parts of benchmarks: time and memory of a step in a separate process, and the results file."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tarflow_scale.runtime import console, provenance

__all__ = [
    "EXACT_MEMORY",
    "Figure",
    "alternate",
    "device_name",
    "measure_step",
    "peak_bytes",
    "public_tarflow",
    "reset_peak",
    "resident_bytes",
    "synchronize",
    "write_results",
]

Figure = tuple[str, float, str]
"""Asked, got, unit."""
_MIB = 1024**2
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Environment of glibc's allocator: freed blocks are given back at once, or kept."""


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {_processor()}"


def measure_step(
    step: Callable[[int], None], batch: int, device: str, repeats: int, warm_up: int = 1
) -> dict[str, float]:
    """Seconds of the fastest of ``repeats`` steps, and the MiB that a step adds at its peak.

    Args:
        step: forward and backward of a batch of the given size.
        batch: the size to measure.
        device: cpu or cuda.
        repeats: timed steps.
        warm_up: steps before, at that size.
    """
    step(1)  # gradients and library buffers are not what a step adds
    synchronize(device)
    before = resident_bytes(device)
    reset_peak(device)
    for _ in range(warm_up):
        step(batch)
    seconds: list[float] = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        step(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "peak_mib": (peak_bytes(device) - before) / _MIB}


def alternate(
    script: str, variants: Sequence[Sequence[str]], rounds: int, memory: bool = True
) -> list[dict[str, float]]:
    """Run ``script --worker VARIANT`` for every variant in turn, ``rounds`` times; the fastest time, and the memory.

    Memory comes from one additional run, in which glibc returns freed blocks at once, so that resident memory is memory
    in use; in the timed runs it keeps them, as the caching allocator of a GPU does. The last line that a worker prints
    is the dictionary of `measure_step`, with any further results.
    """
    found: list[list[dict[str, float]]] = [[] for _ in variants]
    for number in range(rounds + memory):
        for i, variant in enumerate(variants):
            command = [sys.executable, script, "--worker", *variant]
            settings = EXACT_MEMORY if number == rounds else _KEPT_MEMORY
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
            if done.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
            found[i].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {' '.join(variant)}: {found[i][-1]}", file=sys.stderr)
    return [
        {**min(several[:rounds], key=lambda one: one["seconds"]), "peak_mib": several[-1]["peak_mib"]}
        for several in found
    ]


def public_tarflow(checkout: Path, *arguments: Any) -> Any:
    """A model of apple/ml-tarflow, from a checkout, built with these arguments."""
    spec = importlib.util.spec_from_file_location("transformer_flow", checkout / "transformer_flow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model(*arguments)


def write_results(path: Path | None, device: str, figures: dict[str, Figure], **facts: Any) -> None:
    """Print figures, and write a results file where a path is given."""
    print(console.table([(n, f"{g:.4g} {u}", a) for n, (a, g, u) in figures.items()], ("figure", "got", "asked")))
    if path is None:
        return
    content = {
        "command": " ".join(["python", *("PATH" if Path(word).is_absolute() else word for word in sys.argv)]),
        "git_commit": provenance.git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "versions": provenance.package_versions(),
        **facts,
        "figures": {name: {"asked": a, "got": float(f"{g:.7g}"), "unit": u} for name, (a, g, u) in figures.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def resident_bytes(device: str) -> int:
    """Memory in use now."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status_bytes("VmRSS")


def reset_peak(device: str) -> None:
    """Let `peak_bytes` count from now on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes(device: str) -> int:
    """Most memory in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")
