"""Scan a WebDataset tar that another program wrote: find the position and the label of every image in one pass.

`tarflow_scale.shards.sources.tar_rules` defines what a sample is. Links are followed within the tar.
"""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.headers import HashedStream, Member, UnusualHeader, members_by_tarfile, plain_members
from tarflow_scale.shards.sources.junk import junk_kind
from tarflow_scale.shards.sources.tar_files import refuse_compressed
from tarflow_scale.shards.sources.tar_rules import Rules, key_and_extension

__all__ = ["ScannedTar", "scan_tar"]

_BLOCK = 512
_END_BYTES = 1 << 20
"""Maximum number of bytes after the last member that are checked to be zero."""
_MAX_LABEL_BYTES = 1 << 24
_MAX_LINKS = 40
"""Maximum length of a chain of links; the same as in Linux."""
_METADATA = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")
"""Names of files that describe a data set and are not samples."""

Parse = Callable[[IO[bytes] | HashedStream], Iterator[Member]]


@dataclass(frozen=True)
class ScannedTar:
    """The samples of a tar.

    Args:
        name: path below the source.
        keys: keys of the samples that have an image, in order.
        places: for each of these samples, the byte offsets of its start, its end and the start of its image, and the
            size of the image in bytes; ``(n, 4)`` int64. If the image is a link, it may be outside the sample.
        labels: the distinct labels of the tar; None is the entry for samples without a label.
        codes: for each sample, the index of its label in ``labels``; ``(n,)`` int32.
        extensions: extensions of the members, the most frequent first; at most 20.
        ignored: number of members that belong to no sample, by kind.
        num_without: number of samples without an image.
        without: description of the first sample without an image; empty if there is none.
        linked: name of the first sample where the image or the label is a link; empty if there is none.
        sha256: SHA-256 of the tar.
    """

    name: str
    keys: tuple[str, ...]
    places: NDArray[np.int64]
    labels: tuple[int | str | None, ...]
    codes: NDArray[np.int32]
    extensions: tuple[str, ...]
    ignored: Counter[str]
    num_without: int
    without: str
    linked: str
    sha256: str

    def __len__(self) -> int:
        return len(self.keys)


def scan_tar(name: str, root: str, rules: Rules) -> ScannedTar:
    """Scan a tar in one pass. Links, and headers that `plain_members` does not read, need a second pass.

    Args:
        name: path below ``root``.
        root: folder or URL.
        rules: rules that choose the image and the label of a sample.

    Raises:
        DataError: the tar is damaged, cut off or compressed, or has no samples; a key occurs twice; a sample has more
            than one image; or a label is not a number or text.
    """
    location = storage.join(root, name)
    num_bytes = storage.size_bytes(location)
    refuse_compressed(location, storage.read_range(location, 0, 8))
    scan = partial(_scan, name, location, num_bytes, rules)
    try:
        return scan(lambda stream: plain_members(stream, num_bytes))
    except UnusualHeader:
        pass  # read again below with `tarfile`, which is slower and reads all headers
    try:
        return scan(members_by_tarfile)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{location} is not a whole tar ({error}); replace or remove it") from error


def _scan(name: str, location: str, num_bytes: int, rules: Rules, parse: Parse) -> ScannedTar:
    scan = _Scan(name, location, rules, parse)
    with storage.open_seekable(location) as stream:
        hashed = HashedStream(stream)
        for member in parse(hashed):
            scan.add(member, hashed.read)
        _check_end(location, scan.end, num_bytes)
        hashed.seek(num_bytes)
    return scan.result(hashed.sha256.hexdigest())


def _check_end(location: str, end: int, size: int) -> None:
    """Check that the last member is followed by at least two blocks, and only by zeros.

    Otherwise, the tar was cut off, or a header is damaged and ``tarfile`` would treat it as the end of the tar.
    """
    if size < end:
        raise DataError(f"{location} is not a whole tar (it ends inside its last sample); replace or remove it")
    rest = storage.read_range(location, end, min(size, end + _END_BYTES))
    if len(rest) < 2 * _BLOCK or rest.strip(b"\0"):
        raise DataError(
            f"{location} is not a whole tar (no end mark after byte {end:,} of {size:,}: it was cut off, or a header "
            f"is damaged); replace or remove it"
        )


@dataclass
class _KeyRun:
    """Consecutive members that share a key. A link is replaced by its target; a link without a target is left out."""

    key: str
    start: int
    stop: int = 0
    extensions: set[str] = field(default_factory=set)
    members: dict[str, Member] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)


class _Sample(NamedTuple):
    """The key of a sample, the byte positions of the sample and its image in the tar, and the index of its label."""

    key: str
    start: int
    stop: int
    data: int
    size: int
    code: int


class _Scan:
    """Collects the members of a tar into samples."""

    def __init__(self, name: str, location: str, rules: Rules, parse: Parse) -> None:
        self._name, self._location, self._rules, self._parse = name, location, rules, parse
        self.end = 0
        self._run: _KeyRun | None = None
        self._seen: set[str] = set()
        self._rows: list[_Sample] = []
        self._labels: dict[int | str | None, int] = {}
        self._extensions: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._num_without, self._without, self._linked = 0, "", ""

    def add(self, member: Member, read: Callable[[int], bytes]) -> None:
        """Add the next member of the tar.

        Args:
            member: the member.
            read: reads the given number of bytes from the start of the member's content.
        """
        self.end = member.stop
        if member.kind == "folder":
            return
        if member.kind == "special":
            self._ignored["special file"] += 1
            return
        junk = junk_kind(member.name)
        parts = None if junk else key_and_extension(member.name)
        if parts is None:
            base = member.name.rpartition("/")[2]
            self._ignored[junk or (base if base.lower() in _METADATA else "name without extension")] += 1
            return
        key, extension = parts
        if self._run is None or self._run.key != key:
            self._finish()
            if key in self._seen:
                raise DataError(
                    f"members with the same key must follow each other in a tar (got other keys between members of "
                    f"{key} in {self._location}; a key ends at the first dot of a name); sort the members by key"
                )
            self._seen.add(key)
            self._run = _KeyRun(key, member.start)
        run = self._run
        if extension in run.extensions:
            raise DataError(
                f"a tar must hold each member name once (got {member.name} twice in {self._location}); remove one"
            )
        run.extensions.add(extension)
        run.stop = member.stop
        self._extensions[extension] += 1
        is_link = member.kind != "file"
        target = _target(member, self._by_name) if is_link else member
        if target is None:
            self._ignored["link without a target in its tar"] += 1
            return
        if is_link:
            run.links.append(extension)
        run.members[extension] = target
        if self._rules.may_be_label(extension, run.members):
            if target.size > _MAX_LABEL_BYTES:
                place = f"{self._name}:{target.name}"
                raise DataError(f"{place} is too large for a label ({target.size:,} bytes); remove it")
            start, stop = target.data, target.data + target.size
            content = storage.read_range(self._location, start, stop) if is_link else read(target.size)
            run.contents[extension] = content

    @cached_property
    def _by_name(self) -> dict[str, list[Member]]:
        """All members of the tar by name, to follow links; read in a second pass when the first link occurs."""
        by_name: dict[str, list[Member]] = {}
        with storage.open_seekable(self._location) as stream:
            for member in self._parse(stream):
                by_name.setdefault(posixpath.normpath(member.name), []).append(member)
        return by_name

    def result(self, sha256: str) -> ScannedTar:
        """The scanned tar."""
        self._finish()
        if not self._seen:
            raise DataError(f"no samples in {self._location}; replace or remove it")
        rows = self._rows
        return ScannedTar(
            name=self._name,
            keys=tuple(row.key for row in rows),
            places=np.array([row[1:5] for row in rows], dtype=np.int64).reshape(len(rows), 4),
            labels=tuple(self._labels),
            codes=np.array([row.code for row in rows], dtype=np.int32),
            extensions=tuple(extension for extension, _ in self._extensions.most_common(20)),
            ignored=self._ignored,
            num_without=self._num_without,
            without=self._without,
            linked=self._linked,
            sha256=sha256,
        )

    def _finish(self) -> None:
        """Turn the current run into a sample, unless it has no image."""
        run, self._run = self._run, None
        if run is None or not run.members:
            return
        sample, extensions = f"{self._name}:{run.key}", list(run.members)
        image = self._rules.image_of(extensions, sample)
        stem = run.key.rpartition("/")[2]
        if image is not None:
            label = self._rules.label_of(extensions, run.contents.__getitem__, sample)
            code, member = self._labels.setdefault(label, len(self._labels)), run.members[image]
            self._rows.append(_Sample(run.key, run.start, run.stop, member.data, member.size, code))
        elif stem.lower() in _METADATA or (stem.startswith("__") and stem.endswith("__")):
            self._ignored.update(f"{stem}.{extension}" for extension in extensions)
        else:
            members = f"members: {', '.join(sorted(extensions))}"
            self._without = self._without or f"{sample} has no {self._rules.image or 'image'} ({members})"
            self._num_without += 1
        for extension in run.links:
            is_image = image is not None and run.members[extension].data == run.members[image].data
            if is_image or self._rules.may_be_label(extension, {}):
                self._linked = self._linked or sample


def _target(link: Member, by_name: dict[str, list[Member]]) -> Member | None:
    """The file that a link points to; None if there is none.

    If several members have the same name, the last one counts; for a hard link, the last one before the link.
    """
    for _ in range(_MAX_LINKS):
        is_hard = link.kind == "hard link"
        path = link.target if is_hard else posixpath.join(posixpath.dirname(link.name), link.target)
        targets = by_name.get(posixpath.normpath(path), [])
        targets = [member for member in targets if member.start < link.start] if is_hard else targets
        if not targets or targets[-1].kind in ("folder", "special"):
            return None
        link = targets[-1]
        if link.kind == "file":
            return link
    return None
