"""Two hosts for real: two network namespaces joined by a cable, a launcher in each, one run."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.conftest import TOP, Trained, command, train_arguments
from tests.test_train import curve, weights

HOSTS = {"tarflow-a": "10.77.0.1", "tarflow-b": "10.77.0.2"}
PORT = 29611


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def allowed() -> str:
    """Why there can be no namespaces here; empty if there can."""
    try:
        ip("netns", "add", "tarflow-probe")
        ip("netns", "del", "tarflow-probe")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here ({error})"
    return ""


@pytest.fixture
def hosts() -> Generator[dict[str, str]]:
    if reason := allowed():
        pytest.skip(reason)
    for name in HOSTS:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        ip("netns", "add", name)
    first, second = HOSTS
    ip("link", "add", "cable0", "netns", first, "type", "veth", "peer", "name", "cable0", "netns", second)
    for name, address in HOSTS.items():
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable0")
        for device in ("cable0", "lo"):
            ip("-n", name, "link", "set", device, "up")
    yield HOSTS
    for name in HOSTS:
        ip("netns", "del", name)


@pytest.mark.distributed
def test_two_hosts_train_like_one(hosts: dict[str, str], trained: Trained, tmp_path: Path) -> None:
    first, _ = hosts
    launched = []
    for name in hosts:
        arguments = train_arguments(trained.data, tmp_path / "two", tmp_path / "registry", "training.total_images=640")
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[first]}:{PORT}", "--rdzv-id", "test"]
        rendezvous += ["--rdzv-conf", f"is_host={int(name == first)}"]  # it cannot tell by the name of the machine
        launched.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                 "--nproc-per-node", "1", *rendezvous, "--local-addr", hosts[name], "-m", "tarflow_scale", *arguments],
                cwd=TOP,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable0"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], outputs
    one = train_arguments(trained.data, tmp_path / "one", tmp_path / "registry", "training.total_images=640")
    assert command(*one, ranks=2).returncode == 0
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
