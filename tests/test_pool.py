"""The pool: both executors give the same results, and losing a worker changes nothing."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tarflow_scale.errors import ConfigError, PlanError, UserError
from tarflow_scale.pool import Pool, temporary_folder, work


class Squarer:
    """Squares; dies once if asked to, and fails as a user's mistake would on a negative number."""

    def __init__(self, offset: int, die_once: str = "") -> None:
        if offset < 0:
            raise PlanError(f"offset must not be negative (got {offset}); choose another")
        self._offset = offset
        self._die_once = Path(die_once) if die_once else None

    def run(self, unit: int) -> int:
        if unit < 0:
            raise PlanError(f"units must not be negative (got {unit}); count from 0")
        if unit == 3 and self._die_once and not self._die_once.exists():
            self._die_once.touch()
            os._exit(1)
        return unit * unit + self._offset


def run(arguments: dict[str, Any], units: Any, **cluster: Any) -> list[tuple[Any, Any]]:
    with Pool(**cluster) as pool:
        return list(pool.run(Squarer, arguments, units))


def test_in_this_process() -> None:
    assert run({"offset": 1}, range(4), executor="local") == [(0, 1), (1, 2), (2, 5), (3, 10)]
    assert run({"offset": 1}, [], executor="local") == []


@dataclass(frozen=True)
class Images:
    """A unit of work."""

    num_images: int


class Counter:
    """Counts the images of a unit."""

    def run(self, unit: Images) -> int:
        return unit.num_images


class RecordedBar:
    """A progress bar that remembers what it was told."""

    def __init__(self, total: int, description: str, initial: int) -> None:
        self.calls: list[Any] = [(total, description, initial)]

    def __enter__(self) -> "RecordedBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.calls.append("closed")

    def update(self, number: int) -> None:
        self.calls.append(number)

    def tell(self, facts: str) -> None:
        self.calls.append(facts)


def test_a_job_runs_what_is_missing_and_shows_progress_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[RecordedBar] = []
    monkeypatch.setattr(work.console, "ProgressBar", lambda *a, **o: bars.append(RecordedBar(*a, **o)) or bars[-1])
    units = [Images(10), Images(20), Images(30)]
    results: list[tuple[Images, int]] = []
    with Pool("local") as pool:
        for result in pool.run_missing(Counter, {}, units, units[1:], "count", lambda: f"{len(results)} so far"):
            results.append(result)
    assert results == [(Images(20), 20), (Images(30), 30)]
    assert bars[0].calls == [(60, "count", 10), 20, "1 so far", 30, "2 so far", "closed"]


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "ray://head.example:10001", "[2001:db8::1]:6379"])
def test_a_cluster_elsewhere_needs_a_token(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is sent there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where no cluster was ever started
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="needs Ray's token authentication"):
        Pool("ray", address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ConfigError, match="needs Ray's token authentication"):
        Pool("ray", address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    Pool("ray", address)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    for nearby in ("127.0.0.1:6379", "localhost:6379", "ray://[::1]:10001", "auto"):
        Pool("ray", nearby)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")  # then this is what auto means
    with pytest.raises(ConfigError, match=r"needs Ray's token authentication \(got 10.0.0.7:6379\)"):
        Pool("ray", "auto")


def test_an_address_without_a_port_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"must be host:port, ray://host:port or auto \(got localhost\); add the port"
    ):
        run({"offset": 0}, [0], executor="ray", address="localhost")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where no cluster was ever started
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="no Ray cluster was found for cluster.address=auto"):
        run({"offset": 0}, [0], executor="ray", address="auto")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_where_no_cluster_answers_is_one_line(address: str) -> None:
    with pytest.raises(UserError, match=rf"^no Ray cluster answers at {address}; start one"):
        run({"offset": 0}, [0], executor="ray", address=address)


@pytest.mark.parametrize("trouble", ["long_path", "a_file", "of_another_user", "not_there"])
def test_ray_that_cannot_use_its_temporary_folder_is_one_line(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"long_path": tmp_path / ("long-" * 20), "not_there": Path("/proc/absent")}.get(trouble, tmp_path / "x")
    if trouble == "a_file":
        folder.touch()
    elif trouble == "of_another_user":  # whom not even root may disturb
        monkeypatch.setattr(os, "makedirs", refused(os.makedirs, str(folder)))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    with pytest.raises(UserError) as caught:
        run({"offset": 0}, [0], executor="ray")
    message = str(caught.value)
    assert message.startswith(f"Ray must be able to keep its sockets and files below {folder}/ray (got: ")
    assert message.endswith("set RAY_TMPDIR to a folder of your own with a short path and free space")
    assert "\n" not in message


def test_ray_that_starts_too_slowly_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nMore about it.")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(UserError, match=r"^Ray must start on this machine \(got: The current node timed out during"):
        run({"offset": 0}, [0], executor="ray")


def refused(make: Any, below: str) -> Any:
    def made(name: Any, *arguments: Any, **options: Any) -> None:
        if str(name).startswith(below):
            raise PermissionError(13, "Permission denied", str(name))
        make(name, *arguments, **options)

    return made


def test_rays_temporary_folder_is_the_one_that_ray_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert str(temporary_folder() / "ray") == get_default_ray_temp_dir() == "/tmp/ray"
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.setenv(variable, f"/{variable}")
        assert str(temporary_folder() / "ray") == get_default_ray_temp_dir() == f"/{variable}/ray"


class Printer:
    """Prints to a full disk, and tells how threads of its process wait for each other."""

    def run(self, unit: int) -> str:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        print("x" * 100_000, flush=True)
        return os.environ.get("GOMP_SPINCOUNT", "")


@pytest.mark.ray
def test_on_ray_a_worker_may_die_or_print_to_a_full_disk_and_its_threads_spin_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one cluster that the pool started, because starting one takes ten seconds."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    arguments = {"offset": 1, "die_once": str(tmp_path / "died")}
    with Pool("ray", num_workers=2) as pool:
        found = dict(pool.run(Squarer, arguments, range(8)))
        again = dict(pool.run(Squarer, {"offset": 2}, range(3)))  # on the cores that the first workers had
        printed = dict(pool.run(Printer, {}, [0]))
    assert found == {unit: unit * unit + 1 for unit in range(8)}
    assert again == {0: 2, 1: 3, 2: 6}
    assert (tmp_path / "died").exists()
    assert printed == {0: "1000"}


class Sleeper:
    """Takes a while, and tells where it was; the first on a node waits until another node is at work too."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def run(self, unit: int) -> int:
        (self._folder / f"{unit}-{os.environ.get('RAY_RAYLET_PID', os.getppid())}").touch()
        while len(nodes_at_work(self._folder)) < 2:
            time.sleep(0.05)
        time.sleep(0.3)
        return unit * unit


def nodes_at_work(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_that_dies_loses_no_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no room for its worker elsewhere, so the worker that is left takes over what it had begun."""
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(work, "_LEAST_PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(work, "_PATIENCE", 0.0)  # the first units wait for a node to start
    here = {"node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **here})
    try:
        node = cluster.add_node(num_cpus=1, **here)
        cluster.wait_for_nodes()
        with Pool("ray", cluster.address, num_workers=2) as pool:
            found: list[tuple[int, int]] = []
            for unit, result in pool.run(Sleeper, {"folder": str(tmp_path)}, range(24)):
                found.append((unit, result))
                if len(found) == 8:
                    raylets = nodes_at_work(tmp_path)
                    cluster.remove_node(node, allow_graceful=False)
    finally:
        cluster.shutdown()
    assert len(raylets) == 2  # both nodes were at work when one died
    assert sorted(found) == [(unit, unit * unit) for unit in range(24)]


@pytest.mark.ray
def test_on_ray_a_users_mistake_keeps_its_message(ray_address: str) -> None:
    with pytest.raises(PlanError, match=r"^units must not be negative \(got -1\); count from 0$"):
        run({"offset": 0}, [0, -1], executor="ray", address=ray_address, num_workers=1)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"offset": -2}}, r"^offset must not be negative \(got -2\); choose another$"),
        (
            {"gpus_per_worker": 999},
            r"^the cluster must have 999 GPUs for 1 workers \(got \d+\); lower cluster.num_workers",
        ),
    ],
)
def test_on_ray_a_worker_that_cannot_be_built_or_placed_is_one_line(
    options: dict[str, Any], message: str, ray_address: str
) -> None:
    arguments = options.pop("arguments", {"offset": 0})
    with pytest.raises(UserError, match=message):
        run(arguments, [0], executor="ray", address=ray_address, num_workers=1, **options)
