"""Two hosts for real: two network namespaces joined by a cable. One run by two launchers, one Ray cluster of both."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tarflow_scale.registry import Registry
from tests.conftest import TOP, Trained, command, train_arguments
from tests.forking import HANG_SECONDS
from tests.verbs.test_train import curve, weights

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
        ip("-n", name, "route", "add", "default", "dev", "cable0")  # by which Ray finds its own address
    yield HOSTS
    for name in HOSTS:
        for pid in subprocess.run(
            ["ip", "netns", "pids", name], check=True, capture_output=True, text=True
        ).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", name)


@pytest.mark.slow
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
    outputs = [process.communicate(timeout=HANG_SECONDS)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], outputs
    one = train_arguments(trained.data, tmp_path / "one", tmp_path / "registry", "training.total_images=640")
    assert command(*one, ranks=2).returncode == 0
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.fixture
def ssh(hosts: dict[str, str], tmp_path: Path) -> Generator[str]:
    """A command by which the hosts are reached, as ``launch/hostfile.sh`` takes it."""
    server = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if server is None:
        pytest.skip("no ssh server is installed")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it
    options = ["-o", f"HostKey={key}", "-o", f"AuthorizedKeysFile={key}.pub", "-o", "StrictModes=no", "-o", "UsePAM=no"]
    servers = [
        subprocess.Popen(["ip", "netns", "exec", name, server, "-D", "-f", "/dev/null", *options]) for name in hosts
    ]
    first, *_ = hosts  # the command is given on the first host
    client = ["ip", "netns", "exec", first, "ssh", "-i", str(key), "-o", "StrictHostKeyChecking=no"]
    client += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    for address in hosts.values():
        while subprocess.run([*client, address, "true"], capture_output=True, check=False).returncode:
            assert all(one.poll() is None for one in servers)
            time.sleep(0.1)
    yield " ".join(client)
    for one in servers:
        one.terminate()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hostfile_trains_on_its_hosts_stops_and_goes_on(
    hosts: dict[str, str], ssh: str, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("# two machines\n" + "".join(f"{one} slots=1\n" for one in hosts.values()))
    (tmp_path / "empty.yaml").write_text("{}")
    _, *arguments = train_arguments(trained.data, tmp_path / "two", tmp_path / "registry", "training.total_images=2560")
    words = ["bash", "launch/hostfile.sh", str(tmp_path / "hostfile"), str(tmp_path / "empty.yaml"), *arguments]
    environment = os.environ | {"SSH": ssh, "GLOO_SOCKET_IFNAME": "cable0", "OMP_NUM_THREADS": "1"}

    def launch(*more: str) -> "subprocess.Popen[str]":
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*words, *more], cwd=TOP, env=environment, **streams)

    process = launch()
    while not (tmp_path / "two/log.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.terminate()
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 75, output
    assert "tarflow-scale: stopped by SIGTERM after" in output
    assert launch().wait(timeout=HANG_SECONDS) == 0
    one = train_arguments(trained.data, tmp_path / "one", tmp_path / "registry", "training.total_images=2560")
    assert command(*one, ranks=2).returncode == 0
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")

    process = launch("optimizer.lr=1")
    output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2
    lines = [line for line in output.splitlines() if not line.startswith("checking the configuration (")]
    assert lines == ["tarflow-scale: error: optimizer.lr: unknown key; check the spelling against --help"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "",
            "the hostfile must have a line such as 'node0 slots=8' for each machine (got no such line in {}); add it",
        ),
        (
            "a slots=2\nb slots=3\n",
            "all lines of a hostfile must have slots=N with the same N (got 2, 3 in {}); correct them",
        ),
        ("a slots=2\nb\n", "all lines of a hostfile must have slots=N with the same N (got 2 in {}); correct them"),
    ],
)
def test_a_hostfile_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "hostfile"
    file.write_text(content)
    words = ["bash", "launch/hostfile.sh", str(file), "configs/train/digits.yaml"]
    result = subprocess.run(words, cwd=TOP, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, message.format(file) + "\n")


def inside(name: str, *words: str, token: str, folder: Path) -> "subprocess.Popen[str]":
    """Start a command on a host, with Ray's files in a folder; its output is one stream."""
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", *words],
        cwd=TOP,
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.ray
def test_two_hosts_evaluate_and_generate_like_one_and_know_their_token(
    hosts: dict[str, str], trained: Trained, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first, second = hosts
    address, token = f"{hosts[first]}:{PORT}", "5" * 64
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # names of sockets must be short
    request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
    shutil.copytree(trained.registry, tmp_path / "registry")
    ray = ["ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--object-store-memory", str(2**28)]
    head = ["--head", "--port", str(PORT), "--include-dashboard", "false", "--node-ip-address", hosts[first]]
    inside(first, *ray, *head, token=token, folder=folder)
    while subprocess.run(["ip", "netns", "exec", second, "bash", "-c", f"</dev/tcp/{hosts[first]}/{PORT}"],
                         capture_output=True, check=False).returncode:  # fmt: skip
        time.sleep(0.2)
    inside(second, *ray, "--address", address, "--node-ip-address", hosts[second], token=token, folder=folder)

    registry = [f"registry.path={tmp_path}/registry", "registry.model=small", "registry.version=1"]
    # A core on each host, so that two workers are on two hosts.
    there = ["cluster.executor=ray", f"cluster.address={address}", "cluster.num_workers=2", "cluster.start_seconds=60"]
    protocols = json.dumps([f"{TOP}/evals/protocols/digits-bits-per-dim.yaml"])
    evaluate = ["evaluate", *registry, f"data.path={trained.data}/test", f"reference.path={trained.data}/train"]
    evaluate += [f"reference.cache={tmp_path}/cache", f"metrics.protocols={protocols}"]
    generate = [
        "generate",
        *registry,
        "sampling.num_images=200",
        "sampling.batch_size=25",
        "shards.samples_per_shard=50",
    ]
    for verb in (evaluate, [*generate, f"shards.path={tmp_path}/two"]):
        process = inside(first, "tarflow_scale", *verb, *there, token=token, folder=folder)
        output, _ = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, output

    refused = inside(
        first, "tarflow_scale", *generate, f"shards.path={tmp_path}/none", *there[:3], token="6" * 64, folder=folder
    )
    output, _ = refused.communicate(timeout=HANG_SECONDS)
    assert refused.returncode == 2, output
    assert output.count("\n") < 12  # the plan, and one line
    assert output.endswith(
        f"\ntarflow-scale: error: the cluster at {address} accepts only its own token (got the token of "
        f"RAY_AUTH_TOKEN); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the token of the cluster\n"
    )
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").glob("*.tar"))

    assert command(*evaluate, "cluster.executor=local").returncode == 0
    two, one = Registry(f"{tmp_path}/registry", "small").state().reports[1][-2:]
    assert two.metrics["bits_per_dim"].value == pytest.approx(one.metrics["bits_per_dim"].value, abs=1e-12)
    assert command(*generate, f"shards.path={tmp_path}/one", "cluster.executor=local").returncode == 0
    tars = sorted(path.name for path in (tmp_path / "one").glob("*.tar"))
    assert len(tars) == 4
    assert [(tmp_path / "two" / name).read_bytes() for name in tars] == [
        (tmp_path / "one" / name).read_bytes() for name in tars
    ]
