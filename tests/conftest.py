"""Fixtures: a small data set, a small trained model in a registry, and ways to run the command line for real."""

import os
import signal
import subprocess
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tarflow_scale import cli
from tarflow_scale.config.prepare import PrepareConfig
from tarflow_scale.pool import OBJECT_STORE_BYTES
from tarflow_scale.verbs.prepare.driver import run as prepare
from tests.forking import HANG_SECONDS, TOP, start

SAMPLES = TOP.parent / "shared" / "data"
"""Real images that may lie beside the checkout; tests of them are skipped where they do not."""

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell leaves it in the background, and processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


PUBLIC_CODE = ("ml-tarflow", "ml-starflow")


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in PUBLIC_CODE:
        parser.addoption(f"--{name}", metavar="PATH", help=f"a checkout of apple/{name}, for the tests 'reference'")


CLUSTERS = {
    "collectives", "doctor", "evaluate", "evaluation_faults", "generate", "generation_faults", "hosts", "pool",
    "ray_cluster", "s3_end_to_end", "score", "slurm",
}  # fmt: skip
"""Files whose tests start Ray, Slurm or hosts of their own, of which one machine has room for one at a time."""


def group_of(test: str) -> str:
    """What one worker runs in order: all tests of clusters, each file with costly fixtures, any other test alone."""
    file = Path(test.partition("::")[0])
    if file.stem.removeprefix("test_") in CLUSTERS:
        return "clusters"
    together = file.parent.name in ("tests", "verbs", "runtime", "capacity", "training") or file.stem == "test_measures"
    return str(file) if together else test


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers of xdist take groups (its own ``--dist loadgroup`` does not work with pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class InGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return InGroups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU cases run where there is one, comparisons with the public code where there is a checkout."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        for name in PUBLIC_CODE:
            wanted = "reference" in item.keywords and name.replace("-", "_") in item.fixturenames  # type: ignore[attr-defined]
            if wanted and not config.getoption(f"--{name}"):
                reason = f"needs --{name} PATH; the stored fixture is compared without it"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def ml_tarflow(request: pytest.FixtureRequest) -> Path:
    """The checkout of apple/ml-tarflow."""
    return Path(str(request.config.getoption("--ml-tarflow")))


@pytest.fixture(scope="session")
def ml_starflow(request: pytest.FixtureRequest) -> Path:
    """The checkout of apple/ml-starflow."""
    return Path(str(request.config.getoption("--ml-starflow")))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, packed: ``train/`` and ``test/``. Read only."""
    path = tmp_path_factory.mktemp("digits")
    config = {"source": {"kind": "digits"}, "shards": {"path": str(path), "samples_per_shard": 200}}
    prepare(PrepareConfig.model_validate(config), dry_run=False)
    return path


def command(
    *arguments: str,
    module: str = "tarflow_scale",
    ranks: int = 0,
    cwd: Path = TOP,
    environment: Mapping[str, str] | None = None,
    real: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m MODULE ARGUMENTS`` to its end; the arguments are those of `tests.forking.start`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(*arguments, module=module, ranks=ranks, cwd=cwd, environment=environment, real=real, **pipes)
    try:
        output, errors = process.communicate(timeout=HANG_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(scope="session")
def ray_address() -> Generator[str]:
    """The address of one Ray cluster of four cores, for all tests that read results alone."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:  # what a pool gives to a cluster of its own
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")
        node = {"num_cpus": 4, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args=node | {"object_store_memory": OBJECT_STORE_BYTES}
        )
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def on_ray(ray_address: str) -> list[str]:
    """Overrides by which a verb uses that cluster."""
    return ["cluster.executor=ray", f"cluster.address={ray_address}"]


SMALL_MODEL = (
    "model.kind=tarflow",
    "model.patch_size=2",
    "model.width=32",
    "model.head_width=16",
    "model.layers_per_block=[1,1]",
    "model.dropout=0.1",
)


def train_arguments(data: Path, run: Path, registry: Path, *more: str) -> list[str]:
    """Arguments of a training run of a few seconds."""
    return [
        "train",
        f"data.path={data}/train",
        *SMALL_MODEL,
        "optimizer.peak_lr=5e-3",
        "training.total_images=1280",
        "training.global_batch_size=32",
        "training.micro_batch_size=16",
        "training.ema_half_life_images=200",
        "training.threads=1",
        "checkpoint.every_images=320",
        "checkpoint.keep_last=10",
        f"logging.path={run}",
        "logging.every_images=64",
        "logging.preview_every_images=640",
        f"registry.path={registry}",
        "registry.model=small",
        *more,
    ]


@dataclass(frozen=True)
class Trained:
    """A finished run and the registry it registered in."""

    data: Path
    run: Path
    registry: Path


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small model, trained by one process from the command line. Tests must not change its registry."""
    folder = tmp_path_factory.mktemp("trained")
    result = command(*train_arguments(digits, folder / "run", folder / "registry"))
    assert result.returncode == 0, result.stderr
    return Trained(digits, folder / "run", folder / "registry")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str) -> None:
    """Check that a command ends with exit code 2, and that its last line names the reason."""
    assert cli.main(arguments) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
