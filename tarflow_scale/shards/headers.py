"""Headers of tars: ustar, GNU (long names, base-256 sizes) and PAX (path, linkpath, size), read in one pass.

`plain_members` takes the headers that archivers write every day and stops at anything else. `members_by_tarfile` takes
what the standard library does, several times slower, and decides about everything that is unusual or damaged. Where
both read a tar, they find the same members.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

import functools
import hashlib
import struct
import tarfile
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

__all__ = [
    "HashedStream",
    "Kind",
    "Member",
    "UnusualHeader",
    "check_member",
    "members_by_tarfile",
    "padded",
    "plain_members",
]

Kind = Literal["file", "hard link", "symbolic link", "folder", "special"]

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_SKIP_BYTES = 1 << 20
_MAX_EXTENDED_BYTES = 1 << 20
"""No name is longer; a PAX header that is may be anything."""
_fields = struct.Struct("100s 24s 12s 12s 8s c 100s 72x 16s 155s 12x").unpack
"""Name; mode, owner and group; size; time; sum; type; link; device numbers; prefix of the name."""
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    **dict.fromkeys((b"3", b"4", b"6"), "special"),
    b"1": "hard link",
    b"2": "symbolic link",
    b"5": "folder",
}


class UnusualHeader(ValueError):
    """A header that `plain_members` leaves to ``tarfile``: of a rare kind, or damaged."""


class Member(NamedTuple):
    """A member of a tar.

    Args:
        name: path in the tar.
        kind: what it is.
        start: byte at which its headers start, extended ones included.
        data: byte at which its content starts.
        size: bytes of content.
        target: of a link.
    """

    name: str
    kind: Kind
    start: int
    data: int
    size: int
    target: str

    @property
    def stop(self) -> int:
        """Byte at which the next member starts."""
        return self.data + padded(self.size)


class HashedStream:
    """A stream that is read forwards, once, while all of it goes through SHA-256.

    Args:
        stream: at its first byte.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._position = 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes."""
        content = self._stream.read(size)
        self.sha256.update(content)
        self._position += len(content)
        return content

    def seek(self, position: int) -> int:
        """Go forwards, to the end of the stream at most."""
        assert position >= self._position
        while self._position < position and self.read(min(position - self._position, _SKIP_BYTES)):
            pass
        return self._position


def padded(size: int) -> int:
    """Bytes that content of ``size`` bytes takes in a tar."""
    return -(-size // _BLOCK) * _BLOCK


def plain_members(stream: IO[bytes] | HashedStream, num_bytes: int) -> Iterator[Member]:
    """Members of a tar up to the first block of zeros. When one is yielded, the stream is at its content.

    Args:
        stream: at the first byte; it may also be moved between two members.
        num_bytes: size of the tar.

    Raises:
        UnusualHeader: a header is none of those that are read here, or content does not lie within the tar.
    """
    position = 0
    while (member := _next_member(stream, position, num_bytes)) is not None:
        yield member
        position = member.stop


def _next_member(stream: IO[bytes] | HashedStream, start: int, num_bytes: int) -> Member | None:
    long: dict[str, str] = {}
    pax: dict[str, str] = {}
    position = start
    while True:
        stream.seek(position)
        header = stream.read(_BLOCK)
        position += _BLOCK
        if header == _ZEROS and not long and not pax:
            return None
        if len(header) < _BLOCK:
            raise UnusualHeader("it ends in a header")
        name, owner, size, modified, total, kind, link, device, prefix = _fields(header)
        num = _number(size)
        _check_numbers(owner, device)
        _number(modified)
        if _number(total) != 256 + sum(header) - sum(total):
            raise UnusualHeader("the sum of a header is wrong")
        if kind not in b"xLK":
            break
        if pax or (kind == b"x" and long) or not 0 < num <= _MAX_EXTENDED_BYTES:
            raise UnusualHeader("extended headers in a rare order or size")
        content = stream.read(padded(num))
        position += padded(num)
        if kind == b"x":
            pax = _records(content, num)
        else:
            long["path" if kind == b"L" else "linkpath"] = _text(content)
    what = _KINDS.get(kind)
    if what is None:
        raise UnusualHeader(f"type {kind!r}")
    path = _text(name)
    if kind == b"\0" and path.endswith("/"):
        what = "folder"
    if prefix[0]:
        path = f"{_text(prefix)}/{path}"
    path = pax.get("path", long.get("path", path))
    if what == "folder" or "path" in pax:
        path = path.rstrip("/")
    if "size" in pax:
        num = int(pax["size"])
    num = num if what == "file" else 0
    if position + padded(num) > num_bytes:
        raise UnusualHeader("it ends in a member")
    target = pax.get("linkpath", long.get("linkpath", _text(link))) if what.endswith("link") else ""
    return Member(path, what, start, position, num, target)


@functools.lru_cache(maxsize=256)
def _check_numbers(owner: bytes, device: bytes) -> None:
    """See that fields that are of no use here are numbers; all headers of a writer have the same."""
    for field in (owner[:8], owner[8:16], owner[16:], device[:8], device[8:]):
        _number(field)


def _number(field: bytes) -> int:
    """A field of octal digits, or a base-256 number that is not negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if not digits.isdigit():
        raise UnusualHeader("a field is no octal number")
    try:
        return int(digits, 8)
    except ValueError as error:
        raise UnusualHeader("a field is no octal number") from error


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _records(content: bytes, size: int) -> dict[str, str]:
    """Keywords and values of a PAX header: records of ``length keyword=value`` and a line end."""
    found: dict[str, str] = {}
    position = 0
    while position < size:
        blank = content.find(b" ", position, position + 20)
        length = content[position:blank] if blank > 0 else b""
        end = position + int(length) if length.isdigit() else 0
        keyword, equals, value = content[blank + 1 : end - 1].partition(b"=")
        if not blank < end <= size or content[end - 1 : end] != b"\n" or not equals or not keyword:
            raise UnusualHeader("a PAX header is damaged")
        if keyword.startswith(b"GNU.sparse"):
            raise UnusualHeader("a sparse member")
        if keyword in (b"path", b"linkpath", b"size"):
            found[keyword.decode()] = _value(keyword, value)
        else:
            found[""] = ""  # so that a header of other records counts as one
        position = end
    if content[size:].strip(b"\0") or b"hdrcharset=" in content:
        raise UnusualHeader("a PAX header is damaged, or names are in a rare alphabet")
    return found


def _value(keyword: bytes, value: bytes) -> str:
    if keyword == b"size" and not (value.isdigit() and len(value) < 20):
        raise UnusualHeader("a size is no number")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UnusualHeader("a name that is no UTF-8") from error


def members_by_tarfile(stream: IO[bytes]) -> Iterator[Member]:
    """Members of a tar as ``tarfile`` finds them; the stream may be moved between two members.

    Raises:
        TarError, EOFError, ValueError, OverflowError: it is no tar, or a member is sparse or of negative size.
    """
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            check_member(member)
            what: Kind = _KINDS.get(member.type, "special")
            if member.isdir():
                what = "folder"
            size = member.size if what == "file" else 0
            target = member.linkname if what.endswith("link") else ""
            yield Member(member.name, what, member.offset, member.offset_data, size, target)
            tar.members = []  # type: ignore[assignment]  # which `tarfile` would keep, a kilobyte each


def check_member(member: tarfile.TarInfo) -> None:
    """See that a member's size is that of bytes in the tar.

    Raises:
        TarError: it is negative, which would send readers back to what they have read, or that of a sparse file, which
            may be anything.
    """
    if member.size < 0 or member.issparse():
        kind = "sparse" if member.issparse() else "of negative size"
        raise tarfile.ReadError(f"{member.name!r:.80} is {kind}")
