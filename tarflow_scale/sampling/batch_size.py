"""Choose the batch size of sampling: by default, the largest that fits in the memory of the device."""

from pathlib import Path

import torch

from tarflow_scale.errors import ConfigError

__all__ = ["fitting_batch", "free_bytes"]

_MOST = 1024
"""Largest batch size chosen automatically. Larger batches are not faster, because reading the cache then dominates."""
_SHARE = 0.9
"""Share of the free memory that a batch may use; the rest is for allocations that are not counted."""
_GIB = 1024**3


def free_bytes(device: torch.device) -> int:
    """Free memory in bytes. On a GPU, it includes PyTorch's unused cache; on a CPU, the cgroup limit is respected."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemAvailable")
    )
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        available = min(available, int(text) - int(used.read_text(encoding="ascii")))
    return available


def fitting_batch(asked: int | None, bytes_per_image: int, device: torch.device) -> int:
    """The requested batch size; if it is None, the largest batch size that fits in memory.

    Raises:
        ConfigError: the requested size, or a single image, does not fit.
    """
    fits = int(_SHARE * free_bytes(device)) // bytes_per_image
    if fits < (asked or 1):
        free, needed = free_bytes(device) / _GIB, (asked or 1) * bytes_per_image / _GIB
        cure = f"use {fits}, or null for the maximum" if fits else "use another device, or decoder.precision=bf16"
        raise ConfigError(
            f"sampling.batch_size does not fit in memory (got {asked or 1}, which needs {needed:.3g} GiB, and "
            f"{free:.3g} GiB are free); {cure}"
        )
    return asked or min(fits, _MOST)
