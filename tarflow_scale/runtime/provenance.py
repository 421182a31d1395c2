"""What made a result: package versions and git commit; and the peak of memory."""

import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["git_commit", "package_versions", "peak_memory_bytes"]

_PACKAGES = ("tarflow-scale", "torch", "deepspeed", "webdataset", "torch-fidelity", "einops", "ray", "fsspec", "numpy")


def package_versions() -> dict[str, str]:
    """Installed versions of what decides a result."""
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str:
    """Commit of the code that runs, with ``+`` when files differ from it.

    Outside a checkout it is what ``TARFLOW_SCALE_COMMIT`` says, as the images in ``docker/`` do, or ``unknown``.
    """
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("TARFLOW_SCALE_COMMIT") or "unknown"
    return commit + ("+" if changed else "")


def peak_memory_bytes(device: str = "cpu") -> int:
    """Most memory that was in use so far: resident size of this process, or what torch allocated on ``cuda``."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()
