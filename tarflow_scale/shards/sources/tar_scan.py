"""Samples of a WebDataset tar that others wrote: where each image is, and its label; one pass over the tar.

A sample is a run of members that share a key (`tarflow_scale.shards.sources.tar_rules`). Links lead to members of the
same tar.
"""

import posixpath
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.headers import HashedStream, Member, UnusualHeader, members_by_tarfile, plain_members
from tarflow_scale.shards.sources.junk import junk_kind
from tarflow_scale.shards.sources.tar_files import refuse_compressed
from tarflow_scale.shards.sources.tar_rules import Rules, key_and_extension

__all__ = ["ScannedTar", "Without", "scan_tar"]

_BLOCK = 512
_END_BYTES = 1 << 20
"""How much of what follows the end of a tar is looked at."""
_MAX_LABEL_BYTES = 1 << 24
_MAX_LINKS = 40
"""Links that lead to links, as Linux counts them."""
_METADATA = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")
"""Names of files that are about a data set and no sample of it."""


class Without(NamedTuple):
    """Samples without an image: how many, and the first of them."""

    number: int = 0
    example: str = ""


@dataclass(frozen=True)
class ScannedTar:
    """What is in a tar.

    Args:
        name: path below the source.
        keys: of the samples that have an image, in order.
        places: ``(n, 4)`` int64, for each: byte at which the sample starts, byte at which it stops, first byte of the
            image, and its size. The image of a link lies elsewhere in the tar.
        labels: the different ones, None for no label.
        codes: ``(n,)`` int32, index of each sample's label in ``labels``.
        extensions: of members, the most frequent first.
        ignored: members that belong to no sample, by kind.
        without: samples without an image.
        linked: first sample whose image or label is a link; empty without.
        sha256: of the tar.
    """

    name: str
    keys: tuple[str, ...]
    places: NDArray[np.int64]
    labels: tuple[int | str | None, ...]
    codes: NDArray[np.int32]
    extensions: tuple[str, ...]
    ignored: Counter[str]
    without: Without
    linked: str
    sha256: str

    def __len__(self) -> int:
        return len(self.keys)


def scan_tar(name: str, root: str, rules: Rules) -> ScannedTar:
    """The samples of a tar.

    Args:
        name: path below ``root``.
        root: folder or URL.
        rules: of images and labels.

    Raises:
        DataError: it is no whole tar; a key occurs twice; a sample has several images, or an unusable label.
    """
    location = storage.join(root, name)
    num_bytes = storage.size_bytes(location)
    refuse_compressed(location, storage.read_range(location, 0, 8))
    try:
        return _scan_plain(name, location, num_bytes, rules)
    except UnusualHeader:
        return _scan_by_tarfile(name, location, num_bytes, rules)


def _scan_plain(name: str, location: str, num_bytes: int, rules: Rules) -> ScannedTar:
    """By the quick parser of headers.

    Raises:
        UnusualHeader: it leaves a header to `tarfile`.
    """
    scan = _Scan(name, location, rules)
    with storage.open_seekable(location) as stream:
        hashed = HashedStream(stream)
        for member in plain_members(hashed, num_bytes):
            scan.add(member, hashed.read)
        _check_end(location, scan.end, num_bytes)
        hashed.seek(num_bytes)
        return scan.result(lambda: _plain(location, num_bytes), hashed.sha256.hexdigest())


def _scan_by_tarfile(name: str, location: str, num_bytes: int, rules: Rules) -> ScannedTar:
    scan = _Scan(name, location, rules)
    with storage.open_seekable(location) as stream:
        for member in _by_tarfile(location):
            scan.add(member, _reader_at(location, member))
        _check_end(location, scan.end, num_bytes)
        hashed = HashedStream(stream)
        hashed.seek(num_bytes)
    return scan.result(lambda: _by_tarfile(location), hashed.sha256.hexdigest())


def _plain(location: str, num_bytes: int) -> Iterator[Member]:
    with storage.open_seekable(location) as stream:
        yield from plain_members(stream, num_bytes)


def _by_tarfile(location: str) -> Iterator[Member]:
    try:
        with storage.open_seekable(location) as stream:
            yield from members_by_tarfile(stream)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(f"{location} is not a whole tar ({error}); replace or remove it") from error


def _reader_at(location: str, member: Member) -> Callable[[int], bytes]:
    return lambda size: storage.read_range(location, member.data, member.data + size)


def _check_end(location: str, end: int, size: int) -> None:
    """After its last member a tar has two blocks of zeros or more, and nothing else.

    Otherwise it was cut, or a header is damaged; ``tarfile`` takes either for the end.
    """
    if size < end:
        raise DataError(f"{location} is not a whole tar (it ends inside its last sample); replace or remove it")
    rest = storage.read_range(location, end, min(size, end + _END_BYTES))
    if len(rest) < 2 * _BLOCK or rest.strip(b"\0"):
        raise DataError(
            f"{location} is not a whole tar (no end after byte {end:,} of {size:,}: cut, or a damaged header); replace "
            f"or remove it"
        )


@dataclass
class _Run:
    """Members that share a key and follow each other."""

    key: str
    start: int
    stop: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)


class _Row(NamedTuple):
    """A sample that has an image."""

    key: str
    start: int
    stop: int
    data: int
    size: int
    code: int


class _Scan:
    """Members of a tar to its samples, one member after the other."""

    def __init__(self, name: str, location: str, rules: Rules) -> None:
        self._name, self._location, self._rules = name, location, rules
        self.end = 0
        self._run: _Run | None = None
        self._seen: set[str] = set()
        self._rows: list[_Row | _Run] = []
        self._labels: dict[int | str | None, int] = {}
        self._extensions: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._without = Without()
        self._linked = ""

    def add(self, member: Member, read: Callable[[int], bytes]) -> None:
        """Take the next member; ``read`` reads from its first byte."""
        self.end = member.stop
        if member.kind == "folder":
            return
        if member.kind == "special":
            self._ignored["special file"] += 1
            return
        junk = junk_kind(member.name)
        found = None if junk else key_and_extension(member.name)
        if found is None:
            self._ignored[junk or _bare(member.name)] += 1
            return
        key, extension = found
        if self._run is None or self._run.key != key:
            self._finish()
            if key in self._seen:
                raise DataError(
                    f"keys of a tar must differ (got {key} twice in {self._location}; a key ends at the first dot of a "
                    f"name); sort its members by key"
                )
            self._seen.add(key)
            self._run = _Run(key, member.start)
        run = self._run
        if extension in run.members:
            raise DataError(f"names in a tar must differ (got {member.name} twice in {self._location}); remove one")
        if member.kind == "file" and self._rules.may_be_label(extension, run.members):
            run.contents[extension] = self._label_content(member, read)
        run.members[extension] = member
        run.stop = member.stop
        self._extensions[extension] += 1

    def result(self, again: Callable[[], Iterator[Member]], sha256: str) -> ScannedTar:
        """What was found; ``again`` reads the headers once more, where links are to be followed."""
        self._finish()
        if not self._seen:
            raise DataError(f"no samples in {self._location}; replace or remove it")
        waiting = [row for row in self._rows if isinstance(row, _Run)]
        by_name = _by_name(again()) if waiting else {}
        rows = [self._follow(row, by_name) if isinstance(row, _Run) else row for row in self._rows]
        rows = [row for row in rows if row is not None]
        return ScannedTar(
            name=self._name,
            keys=tuple(row.key for row in rows),
            places=np.array([row[1:5] for row in rows], dtype=np.int64).reshape(len(rows), 4),
            labels=tuple(self._labels),
            codes=np.array([row.code for row in rows], dtype=np.int32),
            extensions=tuple(extension for extension, _ in self._extensions.most_common(20)),
            ignored=self._ignored,
            without=self._without,
            linked=self._linked,
            sha256=sha256,
        )

    def _label_content(self, member: Member, read: Callable[[int], bytes]) -> bytes:
        if member.size > _MAX_LABEL_BYTES:
            raise DataError(f"{self._name}:{member.name} is too large for a label ({member.size:,} bytes); remove it")
        return read(member.size)

    def _finish(self) -> None:
        """Close the run; one with links waits until all members are known."""
        run, self._run = self._run, None
        if run is None:
            return
        if any(member.kind != "file" for member in run.members.values()):
            self._rows.append(run)
            return
        row = self._row(run)
        if row is not None:
            self._rows.append(row)

    def _row(self, run: _Run) -> _Row | None:
        """The sample of a run; None without an image."""
        what = f"{self._name}:{run.key}"
        extensions = list(run.members)
        image = self._rules.image_of(extensions, what)
        if image is None:
            stem = run.key.rpartition("/")[2]
            if stem.lower() in _METADATA or (stem.startswith("__") and stem.endswith("__")):
                self._ignored.update(f"{stem}.{extension}" for extension in extensions)
            else:
                members = f"members: {', '.join(sorted(extensions))}"
                example = self._without.example or f"{what} has no {self._rules.image or 'image'} ({members})"
                self._without = Without(self._without.number + 1, example)
            return None
        label = self._rules.label_of(extensions, run.contents.__getitem__, what)
        code = self._labels.setdefault(label, len(self._labels))
        return _Row(run.key, run.start, run.stop, run.members[image].data, run.members[image].size, code)

    def _follow(self, run: _Run, by_name: dict[str, list[Member]]) -> _Row | None:
        """The sample of a run with links, which become the members that they lead to."""
        links = [extension for extension, member in run.members.items() if member.kind != "file"]
        for extension in links:
            target = _target(run.members[extension], by_name)
            if target is None:
                self._ignored["link to nothing in its tar"] += 1
                del run.members[extension]
                continue
            run.members[extension] = target
        if not run.members:
            return None
        for extension, member in run.members.items():
            if extension not in run.contents and self._rules.may_be_label(extension, {}):
                run.contents[extension] = self._label_content(member, _reader_at(self._location, member))
        row = self._row(run)
        for extension in links:
            is_image = row is not None and extension in run.members and run.members[extension].data == row.data
            if is_image or (extension in run.members and self._rules.may_be_label(extension, {})):
                self._linked = self._linked or f"{self._name}:{run.key}"
        return row


def _bare(name: str) -> str:
    """Kind of a name without an extension."""
    base = name.rpartition("/")[2]
    return base if base.lower() in _METADATA else "name without extension"


def _by_name(members: Iterator[Member]) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(posixpath.normpath(member.name), []).append(member)
    return found


def _target(link: Member, by_name: dict[str, list[Member]]) -> Member | None:
    """The file that a link leads to: the last of that name, for a hard link the last that stands before it."""
    for _ in range(_MAX_LINKS):
        is_hard = link.kind == "hard link"
        path = link.target if is_hard else posixpath.join(posixpath.dirname(link.name), link.target)
        found = by_name.get(posixpath.normpath(path), [])
        found = [one for one in found if one.start < link.start] if is_hard else found
        if not found or found[-1].kind in ("folder", "special"):
            return None
        link = found[-1]
        if link.kind == "file":
            return link
    return None
