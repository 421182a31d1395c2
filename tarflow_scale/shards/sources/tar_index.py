"""Index WebDataset tars that another program wrote; they can then be read as a data set without being repacked."""

import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tarflow_scale import storage
from tarflow_scale.config.data import size_of
from tarflow_scale.config.prepare import SourceConfig, SplitConfig
from tarflow_scale.errors import DataError
from tarflow_scale.shards.images import Reading, image_extension, image_size
from tarflow_scale.shards.index import ShardIndex, checksum
from tarflow_scale.shards.manifest import AS_FOUND, Manifest, ShardRecord
from tarflow_scale.shards.reader import members_of
from tarflow_scale.shards.sources.source import reading_of
from tarflow_scale.shards.sources.split_choice import settle_files
from tarflow_scale.shards.sources.splits import role_of
from tarflow_scale.shards.sources.tar_files import tars_of_folder
from tarflow_scale.shards.sources.tar_rules import Rules
from tarflow_scale.shards.sources.tar_scan import ScannedTar, scan_tar
from tarflow_scale.shards.sources.tars import classes_of_tars, file_of, for_each_tar

__all__ = ["index_tars"]

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
"""Shard names that a manifest accepts."""
_AGAIN = "set source.in_place=false and another shards.path to pack the images again"


@dataclass(frozen=True)
class _IndexedTar:
    scanned: ScannedTar
    record: ShardRecord
    index: bytes
    shapes: dict[tuple[int, int, int], str]


def index_tars(config: SourceConfig, num_workers: int = 1) -> tuple[Manifest, list[bytes], Counter[str]]:
    """Compute a manifest and indexes, with which the tars in a folder can be read as a data set.

    Each worker keeps one sample in memory at a time.

    Args:
        config: the source.
        num_workers: number of processes.

    Returns:
        The manifest, the bytes of the index of each tar, and the number of members that belong to no sample, by kind.

    Raises:
        DataError: the tars cannot be used in place, because a tar is damaged, the tars belong to different splits, the
            images differ in size, or training would not find an image or a label.
    """
    path, reading = config.path or "", reading_of(config)
    if storage.exists(path) and not storage.is_folder(path):
        raise DataError(f"source.in_place needs a folder of tars (got {path}); set source.path to the folder")
    source = tars_of_folder(path)
    _check_names(source.names, path)
    index = partial(_index_tar, root=path, rules=Rules.of(config), reading=reading)
    tars = for_each_tar(index, source.names, "index", num_workers)
    scanned = [tar.scanned for tar in tars]
    settle_files([file_of(tar, None) for tar in scanned], SplitConfig())
    class_names, _ = classes_of_tars(scanned, config)
    shapes = {shape: place for tar in reversed(tars) for shape, place in tar.shapes.items()}
    sizes = {shape[1:] for shape in shapes}
    if len(sizes) > 1:
        got = ", ".join(f"{h}x{w} for {where}" for (_, h, w), where in list(shapes.items())[:2])
        raise DataError(f"all images must have the same size (got {got}); {_AGAIN}")
    indexes = [tar.index for tar in tars]
    manifest = Manifest(
        name=storage.base_name(path),
        split="train",
        image_size_pixels=size_of(*next(iter(sizes))),
        num_channels=max(shape[0] for shape in shapes),
        class_names=class_names,
        bit_depth=8,
        codec=AS_FOUND,
        source="WebDataset tars, indexed in place",
        recipe=storage.digest(b"".join(indexes)),
        shards=tuple(tar.record for tar in tars),
        reading=reading,
    )
    return manifest, indexes, sum((tar.ignored for tar in scanned), source.ignored)


def _check_names(names: Sequence[str], path: str) -> None:
    """Check that a manifest accepts the names of the tars, and that all names mean the same split."""
    roles = {role_of(name.removesuffix(".tar")): name for name in reversed(names)}
    if len(roles) > 1:
        splits = " and ".join(f"{role or 'no split'} in {name}" for role, name in roles.items())
        raise DataError(
            f"tars that are indexed in place must belong to one split (got {splits} of {path}); move each split to its "
            f"own folder, or {_AGAIN}"
        )
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise DataError(f"the name of a shard must consist of letters, digits and ._- (got {name!r}); rename it")


def _index_tar(name: str, root: str, rules: Rules, reading: Reading) -> _IndexedTar:
    location = storage.join(root, name)
    scanned = scan_tar(name, root, rules)
    if scanned.linked:
        raise DataError(
            f"links cannot be read in place (got a link in the sample {scanned.linked} of {root}); {_AGAIN}"
        )
    if scanned.num_without or not len(scanned):
        raise DataError(f"every sample must have an image ({scanned.without}); remove the sample, or {_AGAIN}")
    # Bytes between two samples, such as the header of a folder, belong to the earlier sample: samples are contiguous.
    offsets = [*scanned.places[:, 0].tolist(), int(scanned.places[-1, 1])]
    sums: list[int] = []
    shapes: dict[tuple[int, int, int], str] = {}
    for number, key in enumerate(scanned.keys):
        part = storage.read_range(location, offsets[number], offsets[number + 1])
        first = int(scanned.places[number, 2]) - offsets[number]
        image = part[first : first + int(scanned.places[number, 3])]
        place = f"{location}:{key}"
        _check_as_read(part, image, scanned.labels[int(scanned.codes[number])], place)
        sums.append(checksum(part))
        shapes.setdefault(image_size(image, place, reading), place)
    index = ShardIndex(np.array(offsets, np.int64), np.array(sums, np.uint64)).to_bytes()
    record = ShardRecord(
        file=name,
        samples=len(scanned),
        bytes=storage.size_bytes(location),
        sha256=scanned.sha256,
        index_sha256=storage.digest(index),
    )
    return _IndexedTar(scanned, record, index, shapes)


def _check_as_read(content: bytes, image: bytes, label: int | str | None, place: str) -> None:
    """Check that training will read the same image and label from a sample as the scan did.

    Raises:
        DataError: training would read another image or label, or none.
    """
    try:
        members = members_of(content)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{place} cannot be read in place ({' '.join(str(error).split())}); {_AGAIN}") from error
    extension = image_extension(members)
    if extension is None or members[extension] != image:
        raise DataError(
            f"the image of a sample must be the member that training reads in place (got the members "
            f"{', '.join(sorted(members))} for {place}, of which training reads {extension or 'none'}); {_AGAIN}"
        )
    if label is None:
        return
    if "cls" not in members:
        holder = "the .json" if "json" in members else "another member"
        raise DataError(f"labels that are read in place must be in .cls (got one in {holder} of {place}); {_AGAIN}")
    text = members["cls"].strip()
    if not text.isdigit() or int(text) != label:
        raise DataError(
            f"labels that are read in place must be whole numbers (got {text[:20]!r} in .cls of {place}); {_AGAIN}"
        )
