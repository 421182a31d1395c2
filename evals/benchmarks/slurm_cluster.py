"""A private Slurm cluster on one machine, with a controller and several nodes, for benchmarks and tests.

Each node is a network namespace with its own address and host name; a bridge joins them, so ranks of different nodes
communicate over a network. A Slurm or munge of the machine is not touched. Needs root, and Debian's packages slurm-wlm,
munge and iproute2.

    with slurm(folder, nodes=2) as cluster:
        job = cluster.submit("--nodes=2", "launch/slurm/train.sbatch", "configs/train/digits.yaml")
        assert cluster.wait(job) == "COMPLETED"

    python evals/benchmarks/slurm_cluster.py FOLDER        a shell in it
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cluster", "missing", "slurm"]

_BRIDGE, _NETWORK = "tarflow0", "10.78.0"
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
_START_SECONDS = 60.0
_STATES = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "PREEMPTED")
"""Of jobs that are not over."""


def missing() -> str:
    """Why no cluster can be started on this machine; empty if one can."""
    absent = [name for name in _PROGRAMS if _program(name) is None]
    if absent:
        return f"Slurm is not installed here (no {', '.join(absent)})"
    if os.geteuid() != 0:
        return "namespaces of Slurm's nodes need root"
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True, check=False
    )
    return f"no namespaces here ({probe.stderr.strip()})" if probe.returncode else ""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm cluster. Partition ``low`` is the default; jobs of ``high`` preempt those of ``low``."""

    folder: Path
    nodes: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which Slurm's commands find the cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """Run a command of Slurm; its output."""
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr}{done.stdout}")
        return done.stdout

    def submit(self, *words: str, cwd: Path | None = None) -> int:
        """``sbatch WORDS``; the number of the job."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd).split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(number)).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: int | str, seconds: float = 300.0, until: tuple[str, ...] = ()) -> str:
        """Wait until a job is in one of these states or has ended. Returns the state."""
        deadline = time.monotonic() + seconds
        while (state := self.job(number)["JobState"]) in _STATES and state not in until:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is still {state} after {seconds:g} s: {self.job(number)}")
            time.sleep(0.2)
        return state

    def at_once(self, number: int, seconds: float = 300.0) -> None:
        """Let a job that goes back to the queue start soon after it is there: Slurm makes it wait for two minutes.

        Not in the same second, in which nodes take no job of this number because they have just ended one.
        """
        if (state := self.wait(number, seconds, until=("PENDING",))) != "PENDING":
            raise RuntimeError(f"job {number} does not go back to the queue, it is {state}")
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")

    def start_node(self, name: str) -> None:
        """Start a node's daemon, in its namespaces; again, after `kill_node`."""
        own = (
            f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec {_program('slurmd')} -D -N {name}"
        )
        _daemon(self, name, "nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "sh", "-c", own)

    def kill_node(self, name: str) -> None:
        """Kill every process of a node at once, as a power cut does."""
        for pid in self._processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_until_down(self, name: str, seconds: float = 60.0) -> None:
        """Wait until the controller has seen that a node does not answer."""
        deadline = time.monotonic() + seconds
        while "DOWN" not in self.run("scontrol", "show", "node", "--oneliner", name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} is not seen to be down")
            time.sleep(0.5)

    def work_on(self, name: str) -> list[str]:
        """Command lines of the processes of a node, except Slurm's daemon."""
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ") for pid in self._processes(name)]
        return [line.decode(errors="replace") for line in commands if not line.startswith(b"/usr/sbin/slurmd")]

    def _processes(self, name: str) -> list[int]:
        return [int(pid) for pid in subprocess.check_output(["ip", "netns", "pids", name], text=True).split()]


@contextlib.contextmanager
def slurm(folder: Path, nodes: int = 2) -> Generator[Cluster]:
    """Start a controller and nodes ``node1``, ``node2`` .., which share the cores of this machine; stop them last."""
    cluster = Cluster(folder, tuple(f"node{number}" for number in range(1, nodes + 1)))
    for name in ("state", "log", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o755)
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n"
        + f"{_NETWORK}.1 control\n"
        + "".join(f"{_NETWORK}.{number} {name}\n" for number, name in enumerate(cluster.nodes, 2))
    )
    (folder / "slurm.conf").write_text(_configuration(cluster))
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(1024))
    _remove_network(cluster)
    try:
        _make_network(cluster)
        munge = ["--key-file", str(key), "--socket", f"{folder}/munge/socket", "--pid-file", f"{folder}/munge/pid"]
        munge += ["--seed-file", f"{folder}/munge/seed", "--log-file", f"{folder}/log/munged.log", "--force"]
        _daemon(cluster, "munged", _program("munged") or "", "--foreground", *munge)
        _wait_for(folder / "munge/socket")
        own = f"hostname control && mount --bind {folder}/hosts /etc/hosts && exec {_program('slurmctld')} -D -c"
        _daemon(cluster, "control", "unshare", "--uts", "--mount", "sh", "-c", own)
        for name in cluster.nodes:
            cluster.start_node(name)
        _wait_for_nodes(cluster)
        yield cluster
    finally:
        for name in cluster.nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                cluster.kill_node(name)
        for pid_file in folder.glob("daemon-*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid_file.read_text()), signal.SIGKILL)
        _remove_network(cluster)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _configuration(cluster: Cluster) -> str:
    folder, cores = cluster.folder, max(1, (os.cpu_count() or 1) // len(cluster.nodes))
    lines = [
        "ClusterName=tarflow-scale",
        f"SlurmctldHost=control({_NETWORK}.1)",
        "SlurmUser=root",
        f"AuthInfo=socket={folder}/munge/socket",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=bf_interval=1,sched_interval=1",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",
        "SlurmdTimeout=10",
        "KillWait=5",
        "MailProg=/bin/true",
        *(
            f"NodeName={name} NodeAddr={_NETWORK}.{number} CPUs={cores} CoresPerSocket={cores} RealMemory=1000"
            for number, name in enumerate(cluster.nodes, 2)
        ),
        "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=240",
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def _daemon(cluster: Cluster, name: str, *words: str) -> None:
    with (cluster.folder / f"log/{name}.out").open("ab") as log:
        process = subprocess.Popen(words, env=cluster.environment, stdout=log, stderr=log, start_new_session=True)
    (cluster.folder / f"daemon-{name}.pid").write_text(str(process.pid))


def _make_network(cluster: Cluster) -> None:
    _ip("link", "add", _BRIDGE, "type", "bridge")
    _ip("address", "add", f"{_NETWORK}.1/24", "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    for number, name in enumerate(cluster.nodes, 2):
        _ip("netns", "add", name)
        _ip("link", "add", f"tarflow-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"tarflow-{name}", "master", _BRIDGE, "up")
        _ip("-n", name, "address", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "route", "add", "default", "via", f"{_NETWORK}.1")  # by which Ray finds its own address


def _remove_network(cluster: Cluster) -> None:
    for words in [
        *(["link", "delete", f"tarflow-{name}"] for name in cluster.nodes),
        *(["netns", "delete", name] for name in cluster.nodes),
        ["link", "delete", _BRIDGE],
    ]:
        subprocess.run(["ip", *words], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not appear")
        time.sleep(0.05)


def _wait_for_nodes(cluster: Cluster) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        asked = subprocess.run(
            ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"],
            env=cluster.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if sum(map(int, asked.stdout.split())) == len(cluster.nodes):
            return
        if time.monotonic() > deadline:
            logs = "".join(path.read_text(errors="replace")[-500:] for path in (cluster.folder / "log").iterdir())
            raise TimeoutError(f"Slurm's nodes do not come up: {asked.stdout}{asked.stderr}\n{logs}")
        time.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="empty; a temporary one if not given")
    with (
        tempfile.TemporaryDirectory() as temporary,
        slurm((parser.parse_args().folder or Path(temporary)).resolve()) as own,
    ):
        subprocess.run([os.environ.get("SHELL", "/bin/sh")], env=own.environment, check=False)
