"""Reading: samples are those of the source, and wrong bytes are noticed."""

import io
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tarflow_scale import storage
from tarflow_scale.errors import DataError, StorageError
from tarflow_scale.shards.images import Codec, decode_image, encode_image, encode_png
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import Manifest, ShardRecord, index_name
from tarflow_scale.shards.reader import Batch, CorruptSample, ShardSet, members_of
from tarflow_scale.shards.writer import publish_manifest


def test_images_and_labels_are_those_of_the_source(digits: Path) -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    known = {
        image.astype(np.uint8).tobytes(): int(label) for image, label in zip(source.images, source.target, strict=True)
    }
    shards = ShardSet(f"{digits}/test")
    batch = shards.take(np.arange(shards.manifest.num_images))
    capped = {np.minimum(np.frombuffer(key, np.uint8), 15).tobytes(): label for key, label in known.items()}
    assert batch.events.dtype == np.uint8
    assert all(
        capped[(image // 17).tobytes()] == label for image, label in zip(batch.events, batch.labels, strict=True)
    )


def test_evaluation_reads_everything_in_order(digits: Path) -> None:
    shards = ShardSet(f"{digits}/test")
    num = shards.manifest.num_images
    batches: list[Batch] = list(shards.batches(0, num, 100))
    assert [len(batch.events) for batch in batches] == [100, 100, 100, num - 300]
    assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(num))


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(digits / "test", tmp_path / "test")
    return tmp_path / "test"


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("offset", [3, 600, 5000, 100_000])
def test_a_flipped_bit_is_found_whatever_it_hits(copy: Path, offset: int) -> None:
    damage(copy / "test-00000.tar", offset)
    shards = ShardSet(str(copy))
    with pytest.raises(DataError, match="does not match its checksum"):
        shards.take(np.arange(200))
    with pytest.raises(DataError, match=r"test-00000.tar does not match its manifest \(sha256 differs\)"):
        ShardSet(str(copy), verify="full")


@pytest.mark.parametrize("field", [b"-0000001000", b"-0000002000", b"-1"])
@pytest.mark.parametrize("kind", [b"0", b"L"])
def test_members_of_negative_size_end_the_reading(field: bytes, kind: bytes) -> None:
    """Such a member would lead the reader back to its start, in an endless loop."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a" * 120 if kind == b"L" else "a", "b", "c"):
            tar.addfile(tarfile.TarInfo(name))
    content = bytearray(buffer.getvalue()[: 512 * (5 if kind == b"L" else 3)])
    assert content[156:157] == kind
    at = len(content) - 512
    content[at + 124 : at + 136] = field.ljust(12, b"\0")
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    with pytest.raises((tarfile.TarError, ValueError), match="negative size"):
        members_of(bytes(content))


def test_a_truncated_shard_is_found_when_opening(copy: Path) -> None:
    tar = copy / "test-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"test-00001.tar does not match its manifest \(got \d+ bytes, not \d+\)"):
        ShardSet(str(copy))


def test_a_missing_shard_a_missing_index_and_a_foreign_index_are_found(copy: Path) -> None:
    index = copy / "test-00001.index.npz"
    kept = index.read_bytes()
    index.write_bytes((copy / "test-00000.index.npz").read_bytes())
    with pytest.raises(DataError, match="test-00001.index.npz does not match its manifest"):
        ShardSet(str(copy)).take(np.array([250]))
    index.unlink()
    with pytest.raises(DataError, match="test-00001.index.npz is missing"):
        ShardSet(str(copy)).take(np.array([250]))
    index.write_bytes(kept)
    (copy / "test-00000.tar").unlink()
    with pytest.raises(DataError, match="test-00000.tar is missing"):
        ShardSet(str(copy))


def test_tars_with_extended_headers_are_read_too(digits: Path, tmp_path: Path) -> None:
    """A foreign tar (pax headers, long names) becomes a data set by indexing it."""
    source = ShardSet(f"{digits}/test")
    originals = source.read_run(0, 0, 3)
    buffer = io.BytesIO()
    offsets = [0]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, sample in enumerate(originals):
            for extension, content in sample.members().items():
                info = tarfile.TarInfo(f"{'deep/' * 30}{number:06d}.{extension}")
                info.size = len(content)
                info.pax_headers = {"comment": "é"}
                tar.addfile(info, io.BytesIO(content))
            offsets.append(tar.offset)
    content = buffer.getvalue()
    sums = [checksum(content[a:b]) for a, b in pairwise(offsets)]
    index = ShardIndex(np.array(offsets, np.int64), np.array(sums, np.uint64)).to_bytes()
    (tmp_path / "foreign.tar").write_bytes(content)
    (tmp_path / index_name("foreign.tar")).write_bytes(index)
    record = ShardRecord(
        file="foreign.tar",
        samples=3,
        bytes=len(content),
        sha256=storage.digest(content),
        index_sha256=storage.digest(index),
    )
    facts = source.manifest.model_dump() | {"shards": (record,)}
    publish_manifest(str(tmp_path), Manifest.model_validate(facts))
    batch = ShardSet(str(tmp_path)).take(np.arange(3))
    assert (batch.events == source.take(np.arange(3)).events).all()
    assert (batch.labels == source.take(np.arange(3)).labels).all()


def pack_members(path: Path, members: list[dict[str, bytes]], classes: int = 2, size: int = 4) -> ShardSet:
    """A data set of one shard whose samples have the given members; all checksums are right."""
    buffer = io.BytesIO()
    offsets = [0]
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(members):
            for extension, content in sample.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            offsets.append(tar.offset)
    content = buffer.getvalue()
    sums = [checksum(content[a:b]) for a, b in pairwise(offsets)]
    index = ShardIndex(np.array(offsets, np.int64), np.array(sums, np.uint64)).to_bytes()
    path.mkdir(parents=True, exist_ok=True)
    (path / "a.tar").write_bytes(content)
    (path / index_name("a.tar")).write_bytes(index)
    record = ShardRecord(
        file="a.tar",
        samples=len(members),
        bytes=len(content),
        sha256=storage.digest(content),
        index_sha256=storage.digest(index),
    )
    manifest = Manifest(
        name="made",
        split="train",
        image_size_pixels=size,
        num_channels=1,
        class_names=tuple(str(c) for c in range(classes)),
        bit_depth=8,
        source="a test",
        recipe="0" * 64,
        shards=(record,),
    )
    publish_manifest(str(path), manifest)
    return ShardSet(str(path))


GOOD = encode_png(np.zeros((1, 4, 4), np.uint8))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"cls": b"0"}, r"has no image \(members: cls\)"),
        ({"png": b"", "cls": b"0"}, r"is unusable: its .png is empty \(0 bytes\)"),
        ({"png": b"no image", "cls": b"0"}, r"is unusable: its .png cannot be decoded"),
        ({"png": GOOD[:40], "cls": b"0"}, r"is unusable: its .png cannot be decoded"),
        ({"png": encode_png(np.zeros((1, 4, 5), np.uint8)), "cls": b"0"}, r"its .png must have 4x4 pixels \(got 4x5\)"),
        (
            {"png": encode_png(np.zeros((3, 4, 4), np.uint8)), "cls": b"0"},
            r"its .png has a wrong number of channels \(got 3, not 1\)",
        ),
        ({"npy": encode_image(np.zeros((1, 5, 4), np.uint8), "raw"), "cls": b"0"}, r"\(got uint8 \(1, 5, 4\)\)"),
        ({"png": GOOD}, r"must have a label from 0 to 1 in .cls \(got b''\)"),
        ({"png": GOOD, "cls": b"2"}, r"must have a label from 0 to 1 in .cls \(got b'2'\)"),
        ({"png": GOOD, "cls": b"cat"}, r"must have a label from 0 to 1 in .cls \(got b'cat'\)"),
    ],
)
def test_a_sample_that_is_no_image_with_a_label_is_named(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    shards = pack_members(tmp_path, [{"png": GOOD, "cls": b"1"}, members])
    assert shards.take(np.array([0])).labels.tolist() == [1]
    with pytest.raises(CorruptSample, match=rf"sample 1 of a.tar in {tmp_path} .*{reason}"):
        shards.take(np.array([1]))


def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encode_png(np.zeros((1, 3000, 3000), np.uint8))
    shards = pack_members(tmp_path, [{"png": bomb, "cls": b"0"}])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(CorruptSample, match=r"must have 4x4 pixels \(got 3000x3000\)"):
        shards.take(np.array([0]))


@pytest.mark.parametrize("codec", ["png", "webp", "jpeg", "raw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_codec_comes_back(tmp_path: Path, codec: Codec, channels: int) -> None:
    smooth = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None] * 8, (channels, 16, 16))
    image = decode_image(encode_image(np.ascontiguousarray(smooth), codec), "it", (channels, 16, 16))
    assert abs(image.astype(int) - smooth).max() <= (6 if codec == "jpeg" else 0)


def test_a_store_that_fails_for_a_while_is_waited_for(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(f"{digits}/test")
    original, waits, failures = storage.read_range, list[float](), [3]

    def flaky(location: str, start: int, stop: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise StorageError(f"cannot read {location} (connection reset)")
        return original(location, start, stop)

    monkeypatch.setattr(storage, "read_range", flaky)
    monkeypatch.setattr("tarflow_scale.storage.files.time.sleep", waits.append)
    assert len(shards.take(np.arange(3)).events) == 3
    assert waits == [0.5, 1, 2]
    failures[0] = 1000
    with pytest.raises(DataError, match=r"a shard could not be read during the run, in 6 attempts: cannot read"):
        shards.take(np.arange(3))
