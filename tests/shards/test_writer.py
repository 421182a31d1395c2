"""Shards are plain WebDataset tars, reproducible to the byte, with an index of every sample."""

import io
import json
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import webdataset
from webdataset.writer import TarWriter

from tarflow_scale import storage
from tarflow_scale.shards.images import CODECS, encode_image
from tarflow_scale.shards.index import checksum, read_index
from tarflow_scale.shards.manifest import index_name, read_manifest
from tarflow_scale.shards.writer import PackedShard, Sample


def samples(num: int = 5) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(f"{i:04d}", rng.integers(0, 256, (3, 7, 7), np.uint8), i % 3, {"origin": f"x{i}"}) for i in range(num)
    ]


def test_plain_webdataset_reads_what_we_write(digits: Path) -> None:
    manifest = read_manifest(f"{digits}/test")
    urls = [f"{digits}/test/{shard.file}" for shard in manifest.shards]
    samples = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls", "json")
    )
    assert len({key for key, *_ in samples}) == manifest.num_images
    assert all(image.size == (8, 8) and 0 <= label < 10 and "origin" in record for _, image, label, record in samples)


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = PackedShard.of("s.tar", samples()).write(str(tmp_path / "a"))
    second = PackedShard.of("s.tar", samples()).write(str(tmp_path / "b"))
    assert first == second
    assert (tmp_path / "a/s.tar").read_bytes() == (tmp_path / "b/s.tar").read_bytes()
    assert (tmp_path / "a/s.index.npz").read_bytes() == (tmp_path / "b/s.index.npz").read_bytes()


def test_members_are_sorted_and_carry_no_time(tmp_path: Path) -> None:
    PackedShard.of("s.tar", samples(2)).write(str(tmp_path))
    with tarfile.open(tmp_path / "s.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"{i:04d}.{e}" for i in range(2) for e in ("cls", "json", "png")]
    assert {m.mtime for m in members} == {0}


def test_the_index_points_at_every_sample(tmp_path: Path) -> None:
    record = PackedShard.of("s.tar", samples()).write(str(tmp_path))
    index = read_index(str(tmp_path / index_name("s.tar")), 5, record.index_sha256, record.bytes)
    content = (tmp_path / "s.tar").read_bytes()
    assert storage.digest(content) == record.sha256
    for i in range(5):
        part = content[index.offsets[i] : index.offsets[i + 1]]
        assert part[:8] == f"{i:04d}.cls".encode()
        assert checksum(part) == index.checksums[i]
        assert json.dumps({"origin": f"x{i}"}).encode() in part


def test_an_unlabelled_sample_has_no_class_member() -> None:
    packed = PackedShard.of("a.tar", [Sample("a", np.zeros((1, 2, 2), np.uint8), None)])
    assert b"a.cls" not in packed.tar
    assert packed.record.samples == 1


@pytest.mark.parametrize("label", [0, 9, 999])
def test_labels_survive(tmp_path: Path, label: int) -> None:
    PackedShard.of("s.tar", [Sample("a", np.zeros((1, 2, 2), np.uint8), label)]).write(str(tmp_path))
    [(text,)] = webdataset.WebDataset(f"{tmp_path}/s.tar", shardshuffle=False).decode().to_tuple("cls")
    assert text == label


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_a_shard_is_what_webdataset_writes(codec: Literal["png", "raw"]) -> None:
    keys = ["000000001", "k" * 89, "k" * 95, "k" * 96, "k" * 90, "k" * 120, "schlüssel", "a/b"]
    image = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    content = PackedShard.of(
        "a.tar", [Sample(key, image, label, {"a": 1}) for label, key in enumerate(keys)], codec
    ).tar
    buffer = io.BytesIO()
    expected = TarWriter(buffer, mtime=0, encoder=False)
    expected.tarstream.format = tarfile.PAX_FORMAT
    for label, key in enumerate(keys):
        members = {CODECS[codec]: encode_image(image, codec), "cls": str(label).encode(), "json": b'{"a": 1}'}
        expected.write({"__key__": key, **members})
    expected.close()
    assert content == buffer.getvalue()


def test_the_bytes_are_those_of_the_writer_of_webdataset_1_0_2() -> None:
    """The digest is that of the same shard at commit b8a8d6a, which used webdataset's TarWriter."""
    image = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    keys = ["00000000", "00000001", "k" * 95, "k" * 96, "k" * 120, "schlüssel", "a/b", "d/" * 60 + "e"]
    some = [Sample(key, np.roll(image, n), n if n % 3 else None, {"origin": f"x{n}"}) for n, key in enumerate(keys)]
    some.append(Sample("00000009", {"x.npy": b"\1" * 513, "given.npy": b""}, 7))
    content = PackedShard.of("a.tar", some, "raw").tar
    assert storage.digest(content) == "550d6ccd01f5a5b805b74c01b9c985211a04ebabc3cb8f69ee87ead410bb0d92"


def test_long_and_foreign_keys_keep_their_names() -> None:
    keys = ["k" * 120, "schlüssel"]
    content = PackedShard.of("a.tar", [Sample(key, np.zeros((1, 8, 8), np.uint8), None) for key in keys]).tar
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [name for name in tar.getnames() if name.endswith(".png")] == [f"{key}.png" for key in keys]
