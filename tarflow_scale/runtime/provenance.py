"""Facts about this process that are stored with results: package versions, git commit, peak memory."""

import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["git_commit", "installed_version", "package_versions", "peak_memory_bytes"]

_PACKAGES = ("tarflow-scale", "torch", "deepspeed", "webdataset", "torch-fidelity", "einops", "ray", "fsspec", "numpy")


def package_versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that affect results."""
    return {"python": sys.version.split()[0]} | {name: installed_version(name) or "not installed" for name in _PACKAGES}


def installed_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str:
    """Commit of this code, followed by ``+`` if tracked files were changed.

    Outside a checkout, returns the environment variable ``TARFLOW_SCALE_COMMIT``, which the images in ``docker/`` set,
    or ``unknown``.
    """
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("TARFLOW_SCALE_COMMIT") or "unknown"
    return commit + ("+" if changed else "")


def peak_memory_bytes(device: str = "cpu") -> int:
    """Peak memory so far: for ``cpu`` the resident size of this process, for ``cuda`` the allocations of torch."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()
