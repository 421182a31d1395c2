"""The doctor: every line well on a healthy machine, and each planted fault found by name, alone, with what to do.

Every case is a process of its own on a machine that really is broken in that way; what it leaves is looked for after.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tarflow_scale import cli, storage
from tarflow_scale.config.doctor import CHECKS, DoctorConfig
from tarflow_scale.verbs.doctor.launch import environment
from tarflow_scale.verbs.doctor.machine import home
from tests.conftest import TOP, Trained
from tests.forking import HANG_SECONDS, start
from tests.other_users import ALICE, needs_root, run_as

SLOW = ("ranks", "torch", "weights", "cluster")
"""Checks that import torch or Ray; a fault elsewhere is looked for without them."""
QUICK = [name for name in CHECKS if name not in SLOW]
SETTINGS = ("OMP_", "NCCL_", "GLOO_", "MASTER_", "RAY_", "TORCHELASTIC_", "AWS_", "XDG_", "TRITON_", "TORCH_")


@dataclass
class Machine:
    """A healthy one, where a fault can be planted: what is given to the process that is the doctor."""

    tmp: Path
    data: Path
    stack: ExitStack
    fixture: Callable[[str], Any]
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    python_path: list[str] = field(default_factory=list)
    mounts: str = ""
    """Shell commands that mount, run in a mount namespace of the doctor's own."""
    prepare: Callable[[], None] | None = None
    """Called in the child before it becomes the doctor."""

    def __post_init__(self) -> None:
        for name in ("home", "tmp", "store", "run"):
            (self.tmp / name).mkdir()
        self.arguments |= {
            "data.path": f"{self.data}/train",
            "store.path": f"{self.tmp}/store",
            "logging.path": f"{self.tmp}/run",
            "checks.timeout_seconds": "1000",  # met by what hangs alone, on a machine of any speed
        }

    def package(self, name: str, version: str) -> None:
        """Have the metadata of another version of a package come first on the path."""
        folder = self.tmp / "path" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        self.python_path.append(str(self.tmp / "path"))

    def module(self, name: str, text: str) -> None:
        """Have another module of this name come first on the path."""
        (self.tmp / "path" / name).mkdir(parents=True)
        (self.tmp / "path" / name / "__init__.py").write_text(text)
        self.python_path.append(str(self.tmp / "path"))

    def listener(self) -> int:
        """A port where somebody listens who never answers."""
        server = self.stack.enter_context(socket.socket())
        server.bind(("", 0))
        server.listen()
        return server.getsockname()[1]

    def examine(self) -> "Report":
        marker = uuid.uuid4().hex
        kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
        environment = kept | {
            "HOME": f"{self.tmp}/home",
            "TMPDIR": f"{self.tmp}/tmp",
            "RAY_TMPDIR": tempfile.gettempdir(),  # sockets below the folder of a test would have too long a path
            "PYTHONPATH": os.pathsep.join([*self.python_path, str(TOP)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "EXAMINED": marker,
        }
        before = self._files()
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "findings.json")
            command = [sys.executable, "-m", "tarflow_scale", "doctor", f"output.path={output}"]
            command += [f"{key}={value}" for key, value in self.arguments.items()]
            if self.mounts:
                command = ["unshare", "-m", "sh", "-c", f'set -e; {self.mounts}; exec "$@"', "sh", *command]
            result = subprocess.run(
                command,
                cwd=self.tmp,
                env=environment | self.environment,
                capture_output=True,
                text=True,
                timeout=HANG_SECONDS,
                check=False,
                preexec_fn=self.prepare,
            )
            assert output.is_file(), result.stderr
            findings = json.loads(output.read_text())
        assert alive(marker) == []
        assert self._files() == before
        return Report(result.returncode, findings, result.stdout, result.stderr)

    def _files(self) -> set[Path]:
        """Every path; of buckets the objects alone, whose server may keep a folder without any."""
        found = self.tmp.rglob("*")
        return {path for path in found if path.is_file() or self.tmp / "buckets" not in path.parents}


@dataclass(frozen=True)
class Report:
    """What the doctor said."""

    code: int
    findings: list[dict[str, str]]
    stdout: str
    stderr: str

    def having(self, *statuses: str) -> list[str]:
        return [finding["name"] for finding in self.findings if finding["status"] in statuses]


def alive(marker: str) -> list[str]:
    """Command lines of processes that were given this mark, after a moment for those that are being killed."""
    found: list[str] = []
    for _ in range(50):
        found.clear()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if marker.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text())
            except (OSError, ProcessLookupError):
                continue  # gone, or somebody else's
        if not found:
            break
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def machine(digits: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Generator[Machine]:
    with ExitStack() as stack:
        yield Machine(tmp_path, digits, stack, request.getfixturevalue)


def needs_mounts() -> str:
    """Why nothing can be mounted here; empty if it can."""
    try:
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no mount namespaces here ({error})"
    return ""


@dataclass(frozen=True)
class Head:
    """A Ray cluster that takes one token."""

    address: str
    token: Path


@pytest.fixture(scope="module")
def head() -> Generator[Head]:
    """One node on loopback, of two cores."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a short path, for Ray's sockets
    token, port = folder / "token", free_port()
    token.write_text("0123456789abcdef" * 4)
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    ray += [f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false", "--num-cpus=2"]
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder)}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*ray, "--object-store-memory=80000000"],
            env=os.environ | settings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while "Ray runtime started" not in (folder / "log").read_text():
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{port}", token)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        finally:
            os.killpg(server.pid, signal.SIGKILL) if server.poll() is None else None
            shutil.rmtree(folder, ignore_errors=True)


SLOW_READS = """
import sys
import time


def slow(event, arguments):
    if event == "open" and ".doctor-" in str(arguments[0]) and arguments[1] == "r":
        time.sleep(600)


sys.addaudithook(slow)
"""


# -- faults ----------------------------------------------------------------------------------------------------------


def old_package(m: Machine) -> None:
    m.package("einops", "0.1.0")


def old_torchvision(m: Machine) -> None:
    m.module("torchvision", "__version__ = '0.1'\n")


def torch_that_crashes(m: Machine) -> None:
    m.module("torch", "import os\nos.abort()\n")


def no_compiler(m: Machine) -> None:
    m.environment["PATH"] = str(Path(sys.executable).parent)


def unparsable_compiler(m: Machine) -> None:
    m.environment["CC"] = "'gcc"


def absent_compiler(m: Machine) -> None:
    m.environment["CXX"] = "no-such-compiler -O2"


def many_threads(m: Machine) -> None:
    m.environment["OMP_NUM_THREADS"] = "4096"


def no_interface(m: Machine) -> None:
    m.environment["NCCL_SOCKET_IFNAME"] = "ib77"


def no_master(m: Machine) -> None:
    m.environment |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "256.0.0.1", "MASTER_PORT": str(free_port())}


def taken_port(m: Machine) -> None:
    m.environment |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(m.listener())}


def missing_rank(m: Machine) -> None:
    m.environment |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    m.arguments["ranks.timeout_seconds"] = "2"


def small_shared_memory(m: Machine) -> None:
    m.mounts = "mount -t tmpfs -o size=64m tmpfs /dev/shm"


def few_files(m: Machine) -> None:
    m.prepare = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))


def home_of_nobody(m: Machine) -> None:
    m.environment["HOME"] = "/proc/nonexistent"


def no_home(m: Machine) -> None:
    """Of a user whom the system does not know, as in many containers."""
    m.module("sitecustomize", "import os, pwd\ndel os.environ['HOME']\npwd.getpwuid = {}.__getitem__\n")


def temporary_of_another_user(m: Machine) -> None:
    m.environment["RAY_TMPDIR"] = "/mnt"  # a short path
    m.mounts = "mount -t tmpfs tmpfs /mnt; mkdir /mnt/ray; mount -t tmpfs -o ro tmpfs /mnt/ray"


def long_sockets(m: Machine) -> None:
    place = m.tmp / ("long-" * 20)
    place.mkdir()
    m.environment["RAY_TMPDIR"] = str(place)


def full_disk(m: Machine) -> None:
    m.mounts = f"mount -t tmpfs -o size=64k tmpfs {m.tmp}/run"


def full_disk_of_checkpoints(m: Machine) -> None:
    """Room for the least, but not for what this job keeps."""
    m.mounts = f"mount -t tmpfs -o size=1100m tmpfs {m.tmp}/run"
    m.arguments |= {
        "model": "{kind: tarflow, patch_size: 2, width: 512, layers_per_block: [8, 8]}",
        "training": "{total_images: 1000000, global_batch_size: 8, micro_batch_size: 8}",
        "checkpoint": "{every_images: 1000, keep_every_images: 100000}",
    }


def no_data(m: Machine) -> None:
    m.arguments["data.path"] = f"{m.tmp}/store"


def short_shard(m: Machine) -> None:
    shutil.copytree(m.data / "train", m.tmp / "data")
    shard = min((m.tmp / "data").glob("*.tar"))
    os.truncate(shard, 100)
    m.arguments["data.path"] = f"{m.tmp}/data"


def read_only_store(m: Machine) -> None:
    m.mounts = f"mount -t tmpfs -o ro tmpfs {m.tmp}/store"


def store_without_winners(m: Machine) -> None:
    """rclone's server overwrites what a conditional put should leave alone."""
    pytest.importorskip("s3fs")
    s3_server = pytest.importorskip("evals.benchmarks.s3_server")
    (m.tmp / "buckets" / "bucket").mkdir(parents=True)
    m.environment |= m.stack.enter_context(s3_server.serving(m.tmp / "buckets"))
    m.arguments["store.path"] = "s3://bucket"


def store_that_hangs(m: Machine) -> None:
    pytest.importorskip("s3fs")
    m.environment |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{m.listener()}"}
    m.environment |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    m.arguments |= {"store.path": "s3://bucket", "checks.timeout_seconds": "4", "checks.only": "[limits, store]"}


def weights(m: Machine, content: bytes) -> None:
    """A protocol that asks for the weights ``right``, and a file with this content."""
    protocol = {"name": "fid", "metric": "frechet", "extractor": "inception-v3-compat", "num_images": 10, "seed": 0}
    protocol |= {"bit_depth": 8, "rounding": "nearest", "extractor_sha256": storage.digest(b"right")}
    (m.tmp / "fid.yaml").write_text(yaml.safe_dump(protocol))
    (m.tmp / "weights.pth").write_bytes(content)
    m.arguments["metrics.protocols"] = f"[{m.tmp}/fid.yaml]"
    m.arguments["metrics.extractor_weights"] = f"{{inception-v3-compat: {m.tmp}/weights.pth}}"


def corrupt_weights(m: Machine) -> None:
    weights(m, b"wrong")


def no_cluster(m: Machine) -> None:
    m.arguments["cluster.address"] = f"127.0.0.1:{free_port()}"


def wrong_token(m: Machine) -> None:
    m.arguments["cluster.address"] = m.fixture("head").address
    m.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "fedcba9876543210" * 4}


def no_token(m: Machine) -> None:
    m.arguments["cluster.address"] = m.fixture("head").address


def on_the_cluster(m: Machine) -> None:
    """Well so far."""
    m.arguments["cluster.address"] = m.fixture("head").address
    m.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(m.fixture("head").token)}


def small_cluster(m: Machine) -> None:
    on_the_cluster(m)
    m.arguments["cluster.num_workers"] = "5"


def other_ray(m: Machine) -> None:
    on_the_cluster(m)
    m.package("ray", "99.0.0")


@dataclass(frozen=True)
class Fault:
    """A fault, the check that must find it (and the finding's name, where that differs), and words that it says."""

    plant: Callable[[Machine], None]
    check: str
    words: str
    advice: str
    name: str = ""


FAULTS = [
    Fault(old_package, "packages", "einops 0.1.0 is not >=", "pip install 'einops>="),
    Fault(old_torchvision, "torch", "does not work with torch", "pip install --force-reinstall", "torchvision"),
    Fault(torch_that_crashes, "torch", "the check crashed (ended by SIGABRT", "reinstall the software"),
    Fault(no_compiler, "compiler", "no gcc and no g++ on the PATH", "install them"),
    Fault(unparsable_compiler, "compiler", "CC='gcc is not a command (No closing quotation)", "correct its quotes"),
    Fault(absent_compiler, "compiler", "CXX=no-such-compiler -O2 is not a command on the PATH", "unset it"),
    Fault(many_threads, "threads", "OMP_NUM_THREADS=4096 on", "set it to"),
    Fault(no_interface, "launch", "NCCL_SOCKET_IFNAME=ib77 is not a network interface", "set it to one of lo"),
    Fault(no_master, "launch", "MASTER_ADDR=256.0.0.1 has no address", "set it to the address of rank 0's host"),
    Fault(taken_port, "launch", "rank 0 cannot listen at MASTER_PORT=", "choose another"),
    Fault(missing_rank, "ranks", "rank 1 of 2 did not answer within 2 s", "check that its host runs"),
    Fault(small_shared_memory, "memory", "/dev/shm has 64 MiB free of 64 MiB", "--shm-size"),
    Fault(few_files, "limits", "a process may have 200 files open", "ulimit -n"),
    Fault(home_of_nobody, "home", "cannot write /proc/nonexistent/.cache/torch_extensions", "set HOME"),
    Fault(no_home, "home", f"HOME is not set and user {os.getuid()} has no home folder", "set HOME"),
    Fault(temporary_of_another_user, "temporary", "cannot write /mnt/ray (Read-only file system)", "of your own"),
    Fault(long_sockets, "temporary", "Linux allows 107", "set RAY_TMPDIR to a shorter path"),
    Fault(full_disk, "disk", "0.0 GiB free at", "free space"),
    Fault(full_disk_of_checkpoints, "disk", "1.1 GiB free at", "keep fewer checkpoints"),
    Fault(no_data, "data", "is not a data set (no manifest.json)", "run 'tarflow-scale prepare'"),
    Fault(short_shard, "data", "has 100 bytes, and its manifest says", "restore the shard"),
    Fault(read_only_store, "store", "(Read-only file system)", "check the path, permissions and space"),
    Fault(store_without_winners, "store", "not support create-if-absent (8 writers", "use a store that supports it"),
    Fault(store_that_hangs, "store", "no answer within 4 s", "find out what hangs"),
    Fault(corrupt_weights, "weights", "weights.pth does not match the extractor of fid (sha256", "replace it"),
    Fault(no_cluster, "cluster", "no Ray cluster answers at 127.0.0.1", "start one (ray start --head)"),
    Fault(wrong_token, "cluster", "got the token of RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH to a file"),
    Fault(no_token, "cluster", "got no token, because RAY_AUTH_MODE is not token", "set RAY_AUTH_MODE=token"),
    Fault(small_cluster, "cluster", "has 2 CPUs, and each of 5 workers needs 1", "lower cluster.num_workers"),
    Fault(other_ray, "cluster", "runs Ray 2.", "install the same versions on both"),
]  # fmt: skip
MOUNTS = (temporary_of_another_user, small_shared_memory, full_disk, full_disk_of_checkpoints, read_only_store)
RAY = (wrong_token, no_token, small_cluster, other_ray)


@pytest.fixture(scope="module")
def wrong_before(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the quick checks find wrong with the machine that the tests run on; usually nothing."""
    with ExitStack() as stack:
        machine = Machine(tmp_path_factory.mktemp("before"), digits, stack, lambda _: None)
        machine.arguments["checks.only"] = json.dumps(QUICK)
        return {*machine.examine().having("failed", "warning")}


def marks_of(fault: Fault) -> list[pytest.MarkDecorator]:
    """Checks that import torch or Ray take seconds each, and so do hangs, which are waited for."""
    takes_long = fault.check in SLOW or "hangs" in fault.plant.__name__
    return [pytest.mark.ray] * (fault.plant in RAY) + [pytest.mark.slow] * takes_long


@pytest.mark.parametrize(
    "fault",
    [pytest.param(one, id=one.plant.__name__, marks=marks_of(one)) for one in FAULTS],
)
def test_a_fault_is_found_alone_and_with_what_to_do(fault: Fault, machine: Machine, wrong_before: set[str]) -> None:
    if fault.plant in MOUNTS and (reason := needs_mounts()):
        pytest.skip(reason)
    machine.arguments["checks.only"] = json.dumps(sorted({*QUICK, fault.check}))
    if fault.check != "compiler":
        machine.environment["CXX"] = "true"  # compiles at once; the machine was examined with a real compiler before
    fault.plant(machine)
    report = machine.examine()
    name = fault.name or fault.check
    assert {*report.having("failed", "warning")} - wrong_before == {name}, report.stdout
    (finding,) = (finding for finding in report.findings if finding["name"] == name and finding["status"] == "failed")
    assert fault.words in finding["found"]
    assert fault.advice in finding["advice"]
    assert report.code == 1
    said = "tarflow-scale: error: all checks must pass (got failed checks: "
    assert report.stderr.startswith(said)
    assert report.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.ray
def test_a_healthy_machine_is_well_in_one_screen(machine: Machine) -> None:
    on_the_cluster(machine)
    weights(machine, b"right")
    report = machine.examine()
    assert report.having("failed", "warning", "skipped") == [], report.stdout
    assert (report.code, report.stderr) == (0, "")
    assert [finding["name"] for finding in report.findings] == [
        name for check in CHECKS for name in (("torchvision", "devices") if check == "torch" else (check,))
    ]
    lines = report.stdout.splitlines()
    assert len(lines) == len(report.findings) <= 40
    assert all(line.startswith("ok ") for line in lines)
    assert "2 gloo ranks on this machine: all-reduce of 16 MiB at " in report.stdout
    assert "1 node, 2 CPUs, 0 GPUs" in report.stdout


def test_a_check_that_is_cut_off_leaves_nothing_in_the_store(machine: Machine) -> None:
    """Of a store that takes what is written, and hangs when it is read."""
    machine.module("sitecustomize", SLOW_READS)
    machine.arguments |= {"checks.only": "[store]", "checks.timeout_seconds": "5"}
    report = machine.examine()  # looks whether a file is left
    assert report.having("failed") == ["store"]
    assert "no answer within 5 s" in report.stdout
    assert [*(machine.tmp / "store").iterdir()] == []


def test_a_compiler_may_have_arguments(machine: Machine) -> None:
    machine.environment |= {"CC": "gcc -O1", "CXX": "env g++ -O1"}
    machine.arguments["checks.only"] = "[compiler]"
    report = machine.examine()
    assert report.having("failed") == []
    assert "env g++ -O1 " in report.stdout


@pytest.mark.parametrize(
    ("sections", "status", "words"),
    [
        ({"shards.path": "{tmp}/store/shards", "sampling.num_images": "8"}, "ok", "1 model can be read"),
        ({}, "warning", "1 model can be read but not written"),
        ({"metrics.extractor_weights": "{{}}"}, "failed", "Read-only file system"),
    ],
    ids=["generate", "alone", "evaluate"],
)
def test_a_registry_that_is_only_read_may_be_read_only(
    sections: dict[str, str], status: str, words: str, machine: Machine, trained: Trained
) -> None:
    if reason := needs_mounts():
        pytest.skip(reason)
    del machine.arguments["store.path"]
    machine.arguments |= {"checks.only": "[store]", "registry.path": str(trained.registry), "registry.model": "small"}
    machine.arguments |= {key: value.format(tmp=machine.tmp) for key, value in sections.items()}
    machine.mounts = f"mount --bind {trained.registry} {trained.registry}; mount -o remount,bind,ro {trained.registry}"
    report = machine.examine()
    (finding,) = (one for one in report.findings if one["found"].startswith(("registry.path=", "cannot write")))
    assert (finding["name"], finding["status"]) == ("store", status)
    assert words in finding["found"]
    assert report.code == (1 if status == "failed" else 0)


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({}, {}, "an equal share"),
        ({"OMP_NUM_THREADS": "1,1"}, {}, "1 thread for training (OMP_NUM_THREADS=1,1)"),
        (
            {"OMP_NUM_THREADS": "4096"},
            {"training": "{total_images: 8, global_batch_size: 8, micro_batch_size: 8, threads: 1}"},
            "1 thread for training (training.threads=1)",
        ),
    ],
)
def test_the_threads_are_those_that_training_will_use(
    environment: dict[str, str], arguments: dict[str, str], words: str, machine: Machine
) -> None:
    first = min(os.sched_getaffinity(0))
    machine.prepare = lambda: os.sched_setaffinity(0, {first})
    machine.environment |= environment
    machine.arguments |= {"checks.only": "[threads]"} | arguments
    report = machine.examine()
    assert report.having("failed", "warning") == [], report.stdout
    assert "1 core, 1 thread for training (" in report.stdout
    assert words in report.stdout


def test_what_nobody_asked_for_is_skipped(machine: Machine) -> None:
    machine.arguments = {"ranks.num_ranks": "0", "checks.only": "[ranks, data, store, weights, cluster]"}
    report = machine.examine()
    assert report.having("skipped") == ["ranks", "data", "store", "weights", "cluster"]
    assert report.code == 0


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_of_a_launcher_are_checked_as_they_would_train(machine: Machine) -> None:
    """The first of them speaks, for all."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    result = subprocess.run(
        [*launch, "tarflow_scale", "doctor", "checks.only=[launch, ranks, limits]"],
        cwd=TOP,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["ok", "launch"], ["ok", "ranks"], ["ok", "limits"]]
    assert "2 gloo ranks on" in result.stdout


@pytest.mark.distributed
def test_ranks_that_no_agent_started_do_not_lose_the_store_of_rank_0() -> None:
    here = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start(
            *("doctor", "checks.only=[launch, ranks]"),
            environment=here | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]
    first, second = (rank.communicate(timeout=HANG_SECONDS)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [line.split()[:2] for line in first.splitlines()] == [["ok", "launch"], ["ok", "ranks"]]
    assert second == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"NCCL_SOCKET_IFNAME": "l"}, ""),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, ""),
        ({"NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME==l is not a network interface"),
        ({"NCCL_SOCKET_IFNAME": "=lo", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "cannot reach ranks on other"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, ""),
        ({"GLOO_SOCKET_IFNAME": "lo,eth77"}, "GLOO_SOCKET_IFNAME=lo,eth77 is not a network interface"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "RANK is set and MASTER_PORT is not"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is not a port"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "RANK=2 is not a rank of WORLD_SIZE=2",
        ),
    ],
)
def test_what_the_environment_says_of_ranks(
    settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (finding,) = environment()
    assert (finding.status == "failed") == bool(words)
    assert words in finding.found


JOBS = ("prepare", "train", "evaluate", "generate", "score", "doctor")
FILES = [file for verb in JOBS for file in sorted((TOP / "configs" / verb).glob("*.yaml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_file_of_a_job_will_do_as_it_is(file: Path) -> None:
    config = DoctorConfig.load(file, ["store.path=elsewhere"])
    raw = yaml.safe_load(file.read_text())
    assert config.written["store.path"] == "elsewhere"
    for key, path in (config.written | config.data_sets).items():
        section, _, name = key.partition(".")
        assert section == "store" or raw[section][name] == path


@pytest.mark.parametrize("verb", ["report", "promote", "convert"])
def test_a_file_of_another_verb_is_refused_as_such(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(next((TOP / "configs" / verb).glob("*.yaml")))]) == 2
    said = "doctor takes configurations of prepare, train, evaluate, generate and score (got section "
    assert said in capsys.readouterr().err


def test_checkpoints_are_as_large_as_is_said(machine: Machine, trained: Trained) -> None:
    """The job of a run that was made: what it needs for each checkpoint is what each of its checkpoints has."""
    run = yaml.safe_load((trained.run / "config.yaml").read_text())
    machine.arguments |= {name: json.dumps(run[name]) for name in ("model", "training", "checkpoint")}
    machine.arguments["checks.only"] = "[disk]"
    (finding,) = machine.examine().findings
    _, _, words = finding["found"].partition("for ")
    kept, _, _, parameters, _ = words.split()
    checkpoints = [folder for folder in (trained.run / "checkpoints").iterdir() if folder.is_dir()]
    sizes = [sum(file.stat().st_size for file in folder.rglob("*")) for folder in checkpoints]
    assert int(kept) == run["checkpoint"]["keep_last"] + 1
    assert max(sizes) == pytest.approx(16 * int(parameters.replace(",", "")), rel=0.1)


@needs_root
def test_the_home_of_another_user_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tmp_path.chmod(0o700)
    _, said = run_as(ALICE, work=lambda: print(home()[0].line))
    assert f"cannot write {tmp_path}/.cache/torch_extensions (Permission denied); set HOME" in said
