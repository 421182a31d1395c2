"""Checks of installed software: versions of packages, torch, torchvision, devices, and a compiler."""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.runtime import distributed
from tarflow_scale.runtime.provenance import installed_version
from tarflow_scale.verbs.doctor.finding import Finding, failed, ok, skipped, warning

__all__ = ["compiler", "packages", "torch_and_devices"]

_OURS = "tarflow-scale"
_SHOWN = ("torch", "deepspeed", "ray")
_DRIVER = Path("/proc/driver/nvidia/version")
_GIB = 1024**3
_COMPILE_SECONDS = 30.0


def packages() -> list[Finding]:
    """Compare the versions of Python and packages with the bounds in the metadata of tarflow-scale."""
    try:
        asked = [Requirement(line) for line in metadata.requires(_OURS) or []]
        python = SpecifierSet(metadata.metadata(_OURS)["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        return [skipped("packages", f"{_OURS} is not installed, so the versions that it needs are not known")]
    wrong: list[str] = []
    cures: list[str] = []
    if not python.contains(platform.python_version()):
        wrong.append(f"Python {platform.python_version()} is not {python}")
        cures.append(f"a Python {python}")
    needed = [package for package in asked if package.marker is None or package.marker.evaluate({"extra": ""})]
    for package in needed:
        version = installed_version(package.name)
        if version is None or not package.specifier.contains(version, prereleases=True):
            wrong.append(f"{package.name} {version or 'none'} is not {package.specifier}")
            cures.append(f"'{package.name}{package.specifier}'")
    if wrong:
        return [failed("packages", ", ".join(wrong), f"pip install {' '.join(cures)}")]
    shown = ", ".join(f"{name} {installed_version(name)}" for name in _SHOWN)
    return [
        ok("packages", f"Python {platform.python_version()}; {len(needed)} packages have allowed versions ({shown})")
    ]


def torch_and_devices(parallelism: ParallelismConfig, cluster: ClusterConfig | None) -> list[Finding]:
    """Check torchvision and devices in one process, because importing torch takes seconds."""
    gpus = cluster.num_workers * cluster.gpus_per_worker if cluster and cluster.address in (None, "local") else 0
    return [_torchvision(), _devices(parallelism.precision, gpus)]


def _torchvision() -> Finding:
    """Check one operator of torchvision. If torchvision was built for another version of torch, all operators fail."""
    import torch

    advice = f"pip install --force-reinstall torchvision in the version for torch {torch.__version__}"
    try:
        from torchvision.ops import nms

        boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
        kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    except Exception as error:
        return failed("torchvision", f"does not work with torch {torch.__version__} ({error})", advice)
    if kept != [0, 2]:
        return failed("torchvision", f"computes wrong results with torch {torch.__version__} ({kept})", advice)
    return ok("torchvision", f"{installed_version('torchvision')} works with torch {torch.__version__}")


def _devices(precision: str, gpus_wanted: int) -> Finding:
    import torch

    driver = _DRIVER.read_text(encoding="utf-8").splitlines()[0] if _DRIVER.exists() else ""
    if not torch.cuda.is_available():
        if driver:
            return failed(
                "devices",
                f"torch for CUDA {torch.version.cuda} sees no GPU, although there is a driver ({driver})",
                "install a driver for this version of CUDA, or torch for this driver; start a container with GPUs",
            )
        if gpus_wanted:
            return failed("devices", f"no GPU for {gpus_wanted} workers", "set cluster.gpus_per_worker to 0")
        return ok("devices", "no GPU, CPU only")
    count, ranks = torch.cuda.device_count(), distributed.local_world_size()
    if max(ranks, gpus_wanted) > count:
        return failed(
            "devices", f"{count} GPUs for {ranks} ranks and {gpus_wanted} workers", "start fewer ranks or workers"
        )
    busy: list[str] = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        if free < total / 2:
            busy.append(f"GPU {index} has {free / _GIB:.0f} of {total / _GIB:.0f} GiB free")
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        if (ones @ ones).sum().item() != 64.0**3:
            return failed("devices", f"GPU {index} computes a wrong product", "do not use this GPU")
    first = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not bf16:
        return failed("devices", f"{first.name} has no bf16", "set parallelism.precision=fp32")
    devices = (
        f"{count} x {first.name}, {first.total_memory / _GIB:.0f} GiB, {'bf16' if bf16 else 'no bf16'}, CUDA "
        f"{torch.version.cuda}"
    )
    if busy:
        return warning("devices", f"{devices}; {', '.join(busy)}", "list the processes that use them with nvidia-smi")
    return ok("devices", devices)


def compiler() -> list[Finding]:
    """Check that the C++ compiler, which DeepSpeed and torch.compile need, works and finds Python's headers."""
    commands: dict[str, list[str]] = {}
    for name, variable in (("gcc", "CC"), ("g++", "CXX")):
        text = os.environ.get(variable)
        try:
            command = shlex.split(text or name)
        except ValueError as error:
            problem = f"{variable}={text} is not a command ({error})"
            return [failed("compiler", problem, f"correct its quotes, or unset {variable}")]
        if text and command != [name] and not (command and shutil.which(command[0])):
            problem = f"{variable}={text} is not a command on the PATH"
            return [failed("compiler", problem, f"correct {variable} or unset it")]
        commands[name] = command
    advice = "install them, e.g. apt-get install gcc g++"
    if missing := [name for name, command in commands.items() if shutil.which(command[0]) is None]:
        return [failed("compiler", f"no {' and no '.join(missing)} on the PATH", advice)]
    command = commands["g++"]
    if error := _compile(command, "#include <vector>\n"):
        return [failed("compiler", f"{shlex.join(command)} does not compile ({error})", advice)]
    if error := _compile(command, "#include <Python.h>\n"):
        return [warning("compiler", f"no Python.h ({error})", "torch.compile needs Python.h: install python3-dev")]
    version = subprocess.run(
        [*command, "-dumpfullversion"], capture_output=True, text=True, errors="replace", check=False
    ).stdout
    return [ok("compiler", f"{shlex.join(command)} {version.strip()}, with Python's headers")]


def _compile(command: list[str], source: str) -> str:
    """Run the compiler; return its first error message, or an empty string if the source compiles."""
    with tempfile.TemporaryDirectory(prefix="tarflow-scale-") as folder:
        file = Path(folder, "try.cpp")
        file.write_text(source, encoding="utf-8")
        include = sysconfig.get_paths()["include"]
        result = subprocess.run(
            [*command, "-fsyntax-only", f"-I{include}", str(file)],
            capture_output=True,
            text=True,
            errors="replace",  # messages are in the language and encoding of the user
            check=False,
            timeout=_COMPILE_SECONDS,
        )
    if result.returncode == 0:
        return ""
    return next((line for line in result.stderr.splitlines() if "error" in line), f"exit code {result.returncode}")
