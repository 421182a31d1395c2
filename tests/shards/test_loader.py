"""What training reads: the same batches for any ranks, workers and restarts; corrupt samples replaced and listed."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarflow_scale import storage
from tarflow_scale.config.data import DataConfig, size_of
from tarflow_scale.errors import DataError
from tarflow_scale.shards import loader as loader_module
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.mix import Mix, open_mix, share_slots
from tarflow_scale.shards.reader import Batch, ShardSet
from tarflow_scale.shards.writer import PackedShard, Sample, publish_manifest
from tests.forking import HANG_SECONDS, start


def pack(path: Path, shards: list[int], value: Callable[[int], int] = lambda n: n % 251, classes: int = 3) -> Path:
    """A data set whose image n is 2x2 pixels of ``value(n)``, with label n % classes."""
    records, first = [], 0
    for number, size in enumerate(shards):
        samples = [
            Sample(f"{first + i:06d}", np.full((1, 2, 2), value(first + i), np.uint8), (first + i) % classes)
            for i in range(size)
        ]
        records.append(PackedShard.of(f"train-{number:05d}.tar", samples).write(str(path)))
        first += size
    manifest = Manifest(
        name="numbers",
        split="train",
        image_size_pixels=2,
        num_channels=1,
        class_names=tuple(str(c) for c in range(classes)),
        bit_depth=8,
        source="a test",
        recipe="0" * 64,
        shards=tuple(records),
    )
    publish_manifest(str(path), manifest)
    return path


def loaders(
    mix: Mix, config: DataConfig, seed: int = 3, ranks: int = 1, quarantine: Path | None = None
) -> list[Loader]:
    share = mix.num_slots // ranks
    return [
        Loader(
            mix,
            range(rank * share, (rank + 1) * share),
            config,
            seed,
            None if quarantine is None else str(quarantine / f"quarantine-{rank:05d}.jsonl"),
        )
        for rank in range(ranks)
    ]


def take(all_ranks: list[Loader], images_seen: int, steps: int) -> list[Batch]:
    """Global batches, put together from all ranks; worker processes of the streams end with it, whatever happens."""
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(loader.batches(images_seen))) for loader in all_ranks]
        return [
            Batch(
                *(
                    np.concatenate([getattr(p, name) for p in parts])
                    for name in ("events", "labels", "samples", "epochs")
                )
            )
            for parts in islice(zip(*streams, strict=True), steps)
        ]


def same(a: list[Batch], b: list[Batch]) -> bool:
    names = ("events", "labels", "samples", "epochs")
    return len(a) == len(b) and all(
        np.array_equal(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True) for name in names
    )


class WorkersInThisProcess:
    """torch's DataLoader with its workers run by turns, on copies that went through pickle; processes take seconds."""

    def __init__(self, dataset: Any, *, num_workers: int, **_: object) -> None:
        self._iterators = [self._worker(dataset, number, num_workers) for number in range(num_workers)]

    def __iter__(self) -> Iterator[Any]:
        for iterator in cycle(self._iterators):
            yield next(iterator)

    @staticmethod
    def _worker(dataset: Any, number: int, num_workers: int) -> Iterator[Any]:
        info = SimpleNamespace(id=number, num_workers=num_workers)
        with pytest.MonkeyPatch.context() as patch:  # slots are shared out when the first batch is asked for
            patch.setattr(loader_module, "get_worker_info", lambda: info)
            items = iter(pickle.loads(pickle.dumps(dataset)))
            first = next(items)
        for item in chain([first], items):
            yield pickle.loads(pickle.dumps(item))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shards=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    slots_per_rank=st.integers(1, 4),
    ranks=st.integers(1, 4),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    stop=st.integers(0, 30),
    threads=st.sampled_from([0, 3]),
    workers=st.integers(0, 4),
)
def test_any_world_size_and_any_stop_give_the_same_global_batches(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[int],
    slots_per_rank: int,
    ranks: int,
    block: int,
    seed: int,
    stop: int,
    threads: int,
    workers: int,
) -> None:
    """Union over ranks and workers: each sample once an epoch, minus at most G - 1; stopping and resuming is exact."""
    slots = slots_per_rank * ranks
    if slots > sum(shards):
        shards = [*shards, slots]
    path = pack(tmp_path_factory.mktemp("packed"), shards)
    config = DataConfig(path=str(path), shuffle_block=block, read_threads=threads)
    mix = open_mix(config, slots, seed)
    per_epoch = sum(shards) // slots
    steps = 2 * per_epoch + 1
    whole = take(loaders(mix, config, seed), 0, steps)
    divided = config.model_copy(update={"num_workers": workers})
    stop = min(stop, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "DataLoader", WorkersInThisProcess)
        assert same(take(loaders(mix, divided, seed, ranks), 0, steps), whole)
        assert same(take(loaders(mix, divided, seed, ranks), stop * slots, steps - stop), whole[stop:])
    for epoch in (0, 1):
        batches = whole[epoch * per_epoch : (epoch + 1) * per_epoch]
        seen = np.concatenate([batch.samples for batch in batches])
        assert {int(e) for batch in batches for e in batch.epochs} == {epoch}
        assert len(set(seen.tolist())) == len(seen) > sum(shards) - slots
    for batch in whole:
        assert (batch.events[:, 0, 0, 0] == batch.samples % 251).all()
        assert (batch.labels == batch.samples % 3).all()


def test_two_epochs_differ(tmp_path: Path) -> None:
    config = DataConfig(path=str(pack(tmp_path, [40, 41])))
    batches = take(loaders(open_mix(config, 8, 0), config), 0, 20)
    assert [b.samples.tolist() for b in batches[:10]] != [b.samples.tolist() for b in batches[10:]]


@pytest.mark.parametrize(
    ("workers", "ranks"),
    [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_worker_processes_change_nothing(tmp_path: Path, workers: int, ranks: int) -> None:
    """Any number of them by turns in one process: `test_any_world_size_and_any_stop_give_the_same_global_batches`."""
    config = DataConfig(path=str(pack(tmp_path, [30, 31])), shuffle_block=5, augmentation={"flip": True})  # pyright: ignore
    mix = open_mix(config, 8, 0)
    alone = take(loaders(mix, config), 16, 12)
    with_workers = config.model_copy(update={"num_workers": workers})
    assert same(take(loaders(mix, with_workers, ranks=ranks), 16, 12), alone)


def test_a_failure_in_a_worker_is_one_line_and_a_killed_worker_is_noticed(tmp_path: Path) -> None:
    path = pack(tmp_path, [30])
    config = DataConfig(path=str(path), num_workers=1)
    mix = open_mix(config, 4, 0)
    healthy = loaders(mix, config)[0].batches(0)
    next(healthy)
    import multiprocessing

    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    with pytest.raises(
        DataError, match=r"a loader process died .*, perhaps because memory ran out; lower data.num_workers"
    ):
        list(islice(healthy, 100))
    healthy.close()
    for first in ShardSet(str(path))._index(0).offsets[:30]:
        damage(path / "train-00000.tar", int(first) + 3)
    with pytest.raises(DataError, match="100 samples in a row are corrupt"):
        take(loaders(mix, config), 0, 10)


@pytest.mark.slow
def test_a_worker_that_is_killed_disturbs_no_other_line_of_the_rank(tmp_path: Path) -> None:
    config = DataConfig(path=str(pack(tmp_path, [30])), num_workers=2)
    stream = loaders(open_mix(config, 4, 0), config)[0].batches(0)
    next(stream)
    import multiprocessing

    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:  # a step of training, in which a handler of DataLoader's would raise
        sum(range(1000))
    with pytest.raises(DataError, match="a loader process died"):
        list(islice(stream, 100))
    stream.close()


def test_workers_leave_signals_to_their_rank(tmp_path: Path) -> None:
    """A launcher sends SIGTERM to the whole group; the rank must still get batches until it has saved."""
    config = DataConfig(path=str(pack(tmp_path, [30])), num_workers=1)
    import multiprocessing

    before = set(multiprocessing.active_children())
    stream = loaders(open_mix(config, 4, 0), config)[0].batches(0)
    next(stream)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 1
    for child in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(child.pid or 0, number)
    assert len(list(islice(stream, 60))) == 60
    assert all(child.is_alive() for child in workers)
    stream.close()


@pytest.mark.slow
def test_signals_to_a_group_from_its_first_moment_leave_no_trace(tmp_path: Path) -> None:
    """SIGUSR1 ends the tracker of multiprocessing, and any process that has not come to ignoring it yet."""
    path = pack(tmp_path / "data", [30])
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, threading\n"
        "from tarflow_scale.config.data import DataConfig\n"
        "from tarflow_scale.shards.loader import Loader\n"
        "from tarflow_scale.shards.mix import open_mix\n"
        "if __name__ == '__main__':\n"
        "    seen, over = [], threading.Event()\n"
        "    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))\n"
        f"    config = DataConfig(path={str(path)!r}, num_workers=2)\n"
        "    stream = Loader(open_mix(config, 4, 0), range(4), config, 0).batches(0)\n"
        "    def tell():\n"
        "        while not over.wait(0.01):\n"
        "            os.killpg(0, signal.SIGUSR1)\n"
        "    teller = threading.Thread(target=tell, daemon=True)\n"
        "    teller.start()\n"
        "    for _ in range(20):\n"
        "        next(stream)\n"
        "    over.set()\n"
        "    teller.join()\n"
        "    stream.close()\n"
        "    print('seen' if seen else 'not seen')\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
        start_new_session=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "seen\n", "")


def test_workers_end_when_their_rank_is_killed(tmp_path: Path) -> None:
    path = pack(tmp_path / "data", [30])
    (tmp_path / "rank.py").write_text(
        "import multiprocessing, sys, time\n"
        "from tarflow_scale.config.data import DataConfig\n"
        "from tarflow_scale.shards.loader import Loader\n"
        "from tarflow_scale.shards.mix import open_mix\n"
        "if __name__ == '__main__':\n"
        f"    config = DataConfig(path={str(path)!r}, num_workers=1)\n"
        "    stream = Loader(open_mix(config, 4, 0), range(4), config, 0).batches(0)\n"
        "    next(stream)\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = start(module="rank", cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 1
    process.kill()
    process.wait()
    deadline = time.monotonic() + HANG_SECONDS
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive their rank"
        time.sleep(0.2)


def damage(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 4
    file.write_bytes(bytes(content))


def test_a_corrupt_sample_is_replaced_by_its_successor_on_every_world_size_and_listed(tmp_path: Path) -> None:
    path = pack(tmp_path / "data", [20, 20])
    shards = ShardSet(str(path))
    first = int(shards._index(1).offsets[7])
    damage(path / "train-00001.tar", first + 520)
    config = DataConfig(path=str(path), shuffle_block=4)
    mix = open_mix(config, 4, 0)
    alone = take(loaders(mix, config, quarantine=tmp_path / "one"), 0, 10)
    assert same(take(loaders(mix, config, ranks=2, quarantine=tmp_path / "two"), 0, 10), alone)
    seen = np.concatenate([batch.samples for batch in alone])
    assert 27 not in seen
    assert sorted(seen.tolist()) == sorted([*(n for n in range(40) if n != 27), 28])
    lines = [json.loads(line) for line in (tmp_path / "one/quarantine-00000.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "shard": f"{path}/train-00001.tar",
            "sample": 7,
            "key": "000027",
            "reason": "does not match its checksum",
        }
    ]
    take(loaders(mix, config, quarantine=tmp_path / "one"), 0, 30)
    assert len((tmp_path / "one/quarantine-00000.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (2, 0)])
def test_replaced_samples_are_counted_whoever_reads_them(tmp_path: Path, ranks: int, workers: int) -> None:
    path = pack(tmp_path, [20])
    for first in ShardSet(str(path))._index(0).offsets[3:13:3]:
        damage(path / "train-00000.tar", int(first) + 3)
    config = DataConfig(path=str(path), num_workers=workers)
    streams = [loader.batches(0) for loader in loaders(open_mix(config, 4, 0), config, ranks=ranks)]
    assert sum(next(stream).num_replaced for _ in range(5) for stream in streams) == 4
    for stream in streams:
        stream.close()


def test_a_fault_on_the_way_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(pack(tmp_path, [20])), shuffle_block=4)
    mix = open_mix(config, 4, 0)
    expected = take(loaders(mix, config), 0, 5)
    original, reads = storage.read_range, list[int]()

    def short(location: str, start: int, stop: int) -> bytes:
        reads.append(start)
        content = original(location, start, stop)
        return content[: len(content) // 2] if len(reads) == 2 else content

    monkeypatch.setattr(storage, "read_range", short)
    found = take(loaders(mix, config, quarantine=tmp_path), 0, 5)
    assert same(found, expected)
    assert not list(tmp_path.glob("quarantine-*"))


def test_a_data_set_without_a_good_sample_ends(tmp_path: Path) -> None:
    path = pack(tmp_path, [6])
    for first in ShardSet(str(path))._index(0).offsets[:6]:
        damage(path / "train-00000.tar", int(first) + 3)
    config = DataConfig(path=str(path), max_corrupt_fraction=1)
    with pytest.raises(DataError, match="100 samples in a row are corrupt"):
        take(loaders(open_mix(config, 2, 0), config), 0, 1)


def test_a_shard_that_is_cut_short_after_opening_costs_only_its_lost_samples(tmp_path: Path) -> None:
    path = pack(tmp_path, [20, 20])
    config = DataConfig(path=str(path), max_corrupt_fraction=0.01)
    mix = open_mix(config, 4, 0)
    offsets = mix.parts[0].shards._index(1).offsets
    os.truncate(path / "train-00001.tar", int(offsets[15]) + 100)
    seen = np.concatenate([batch.samples for batch in take(loaders(mix, config), 0, 10)])
    assert not set(seen.tolist()) & set(range(35, 40))
    assert set(range(1, 35)) <= set(seen.tolist()) | {0}


def test_resuming_reads_at_most_one_block_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(pack(tmp_path, [400, 401])), shuffle_block=16)
    mix = open_mix(config, 8, 0)
    read: list[int] = []
    original = storage.read_range

    def counted(location: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(location, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    take(loaders(mix, config), 0, 100)
    assert sum(read) <= sum(shard.bytes for shard in mix.manifest.shards)
    read.clear()
    take(loaders(mix, config), 55 * 8, 1)
    largest = max(int(np.diff(mix.parts[0].shards._index(i).offsets).max()) for i in range(2))
    assert 0 < sum(read) <= 8 * 16 * largest


def test_read_ahead_keeps_at_most_two_blocks_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(path=str(pack(tmp_path, [100])), shuffle_block=10, read_threads=2)  # 25 steps an epoch
    mix = open_mix(config, 4, 0)
    num_read = [0]
    original = ShardSet.read_run

    def counted(self: ShardSet, shard: int, start: int, stop: int) -> object:
        num_read[0] += stop - start
        return original(self, shard, start, stop)

    monkeypatch.setattr(ShardSet, "read_run", counted)
    stream = loaders(mix, config)[0].batches(0)
    for step in range(60):
        next(stream)
        time.sleep(0.001)
        assert num_read[0] <= (step + 1) * 4 + 4 * 2 * 10
    stream.close()


def test_a_mix_gives_each_set_its_slots_its_line_and_its_epoch(tmp_path: Path) -> None:
    real = pack(tmp_path / "real", [30, 30])
    made = pack(tmp_path / "made", [12], value=lambda n: 200 + n)
    config = DataConfig.model_validate({"path": str(real), "weight": 3, "mix": [{"path": str(made), "weight": 1}]})
    mix = open_mix(config, 8, 0)
    assert [part.spec.num_slots for part in mix.parts] == [6, 2]
    batches = take(loaders(mix, config), 0, 10)
    assert same(take(loaders(mix, config, ranks=4), 0, 10), batches)
    assert same(take(loaders(mix, config, ranks=2), 5 * 8, 5), batches[5:])
    for step, batch in enumerate(batches):
        assert (batch.samples[:6] < 60).all()
        assert (batch.samples[6:] >= 60).all()
        assert (batch.events[6:, 0, 0, 0] == 200 + batch.samples[6:] - 60).all()
        assert batch.epochs.tolist() == [0] * 6 + [step // 6] * 2
    assert len({int(s) for batch in batches for s in batch.samples[:6]}) == 60


@pytest.mark.parametrize(
    ("weights", "slots", "shares"),
    [([1, 1], 7, [4, 3]), ([3, 1], 8, [6, 2]), ([0.99, 0.01], 10, [10, 0]), ([1], 5, [5]), ([1, 1, 1], 8, [3, 3, 2])],
)
def test_slots_are_shared_by_largest_remainders(weights: list[float], slots: int, shares: list[int]) -> None:
    assert share_slots(np.array(weights, dtype=float), slots) == shares


def test_sets_that_do_not_fit_or_get_no_slot_are_refused(tmp_path: Path) -> None:
    a, b = pack(tmp_path / "a", [30]), pack(tmp_path / "b", [30], classes=2)
    c = pack(tmp_path / "c", [30])
    mixed = {"path": str(a), "mix": [{"path": str(b), "weight": 1}]}
    with pytest.raises(DataError, match=r"a mix must have the same class_names \(got .* and \('0', '1'\) in .*b\)"):
        open_mix(DataConfig.model_validate(mixed), 8, 0)
    rare = {"path": str(a), "mix": [{"path": str(c), "weight": 0.01}]}
    with pytest.raises(
        DataError, match=r"must have a sample in the global batch \(got none for .*, with weight 0.01 of 1.01 and"
    ):
        open_mix(DataConfig.model_validate(rare), 8, 0)
    with pytest.raises(DataError, match="must not take more samples from a data set than it has"):
        open_mix(DataConfig(path=str(a)), 31, 0)


@pytest.mark.parametrize(("size", "crop"), [((8, 8), (6, 6)), ((6, 9), (5, 7)), ((9, 4), (7, 4))])
def test_augmentation_follows_seed_epoch_and_sample(
    size: tuple[int, int], crop: tuple[int, int], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 3, *size), np.uint8)
    samples = [Sample(f"{i:03d}", image, 0) for i, image in enumerate(images)]
    record = PackedShard.of("train-00000.tar", samples).write(str(tmp_path))
    facts = ShardSet(str(pack(tmp_path / "x", [2]))).manifest
    update = {"image_size_pixels": size_of(*size), "num_channels": 3, "class_names": ("a",), "shards": (record,)}
    publish_manifest(str(tmp_path), facts.model_copy(update=update))
    config = DataConfig.model_validate({"path": str(tmp_path), "augmentation": {"flip": True, "crop_pixels": crop}})
    mix = open_mix(config, 4, 0)
    batches = take(loaders(mix, config), 0, 20)
    assert same(take(loaders(mix, config, ranks=2), 0, 20), batches)
    assert not same(take(loaders(mix, config, seed=4), 0, 20), batches)
    kinds, (height, width) = set(), crop
    for image, sample in [(im, s) for b in batches for im, s in zip(b.events, b.samples, strict=True)]:
        found = [
            (flip, top, left)
            for flip in (0, 1)
            for top in range(size[0] - height + 1)
            for left in range(size[1] - width + 1)
            if np.array_equal(image, images[sample][:, top : top + height, left : left + width][:, :, :: 1 - 2 * flip])
        ]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) == 2 * (size[0] - height + 1) * (size[1] - width + 1)
    flips_only = replace(loaders(mix, config)[0], config=DataConfig.model_validate({"path": str(tmp_path)}))
    assert next(flips_only.batches(0)).events.shape == (4, 3, *size)


def test_a_missing_shard_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    path = pack(tmp_path, [10, 10])
    (path / "train-00001.tar").unlink()
    with pytest.raises(DataError, match="train-00001.tar is missing, though the manifest names it"):
        open_mix(DataConfig(path=str(path)), 4, 0)


def test_a_data_set_in_a_store_is_read_ahead(tmp_path: Path) -> None:
    import fsspec

    local = pack(tmp_path, [50])
    store = fsspec.filesystem("memory")
    store.put(str(local), "/loader-test", recursive=True)
    config = DataConfig(path="memory://loader-test")
    here = DataConfig(path=str(local))
    assert same(take(loaders(open_mix(config, 5, 0), config), 0, 25), take(loaders(open_mix(here, 5, 0), here), 0, 25))
    store.rm("/loader-test", recursive=True)


def test_encoding_is_what_the_writer_says(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    path = pack(tmp_path, [3])
    members = ShardSet(str(path)).read_run(0, 0, 3)[2].members()
    assert members["png"] == encode_png(np.full((1, 2, 2), 2, np.uint8))
    assert members["cls"] == b"2"
