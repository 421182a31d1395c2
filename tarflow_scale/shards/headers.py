"""Read the headers of tars in one pass: ustar, GNU (long names, base-256 sizes) and PAX (path, linkpath, size).

`plain_members` reads the headers that archivers usually write, and raises an error at any other header.
`members_by_tarfile` uses the standard library, which is several times slower but reads all kinds of headers; it also
decides whether a header is damaged. For a tar that both can read, both return the same members.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

import functools
import hashlib
import struct
import tarfile
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple, cast

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
"""Extended headers longer than this are read by ``tarfile``; no name needs so many bytes."""
_fields = struct.Struct("100s 24s 12s 12s 8s c 100s 72x 16s 155s 12x").unpack
"""Reads a header: name; mode, owner, group; size; time; checksum; type; link target; device numbers; name prefix."""
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    **dict.fromkeys((b"3", b"4", b"6"), "special"),
    b"1": "hard link",
    b"2": "symbolic link",
    b"5": "folder",
}


class UnusualHeader(ValueError):
    """A header that `plain_members` does not read, because it is rare or damaged."""


class Member(NamedTuple):
    """A member of a tar.

    Args:
        name: path in the tar.
        kind: type of the member.
        start: byte at which its headers start, including extended headers.
        data: byte at which its content starts.
        size: size of its content in bytes.
        target: path that a link points to; empty for other members.
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
    """Reads a stream forwards only, and computes the SHA-256 of all bytes that were read.

    Args:
        stream: the stream, at its first byte.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._position = 0
        self.sha256 = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes."""
        content = self._stream.read(size)
        self.sha256.update(content)
        self._position += len(content)
        return content

    def seek(self, position: int) -> int:
        """Read forwards up to a position, or to the end of the stream.

        Raises:
            ValueError: the position is before the current position.
        """
        if position < self._position:
            raise ValueError("a header points back to bytes that were already read")
        while self._position < position and self.read(min(position - self._position, _SKIP_BYTES)):
            pass
        return self._position

    def tell(self) -> int:
        """Number of bytes read so far."""
        return self._position


def padded(size: int) -> int:
    """Number of bytes that ``size`` bytes of content occupy in a tar."""
    return -(-size // _BLOCK) * _BLOCK


def plain_members(stream: IO[bytes] | HashedStream, num_bytes: int) -> Iterator[Member]:
    """Read the members of a tar up to the first block of zeros. At each yield, the stream is at the member's content.

    Args:
        stream: the tar, at its first byte; the caller may move its position between two members.
        num_bytes: size of the tar in bytes.

    Raises:
        UnusualHeader: a header is rare or damaged, or a member extends past the end of the tar.
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
            raise UnusualHeader("the tar ends in a header")
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
    meaning = _KINDS.get(kind)
    if meaning is None:
        raise UnusualHeader(f"type {kind!r}")
    path = _text(name)
    if kind == b"\0" and path.endswith("/"):
        meaning = "folder"
    if prefix[0]:
        path = f"{_text(prefix)}/{path}"
    path = pax.get("path", long.get("path", path))
    if meaning == "folder" or "path" in pax:
        path = path.rstrip("/")
    if "size" in pax:
        num = int(pax["size"])
    num = num if meaning == "file" else 0
    if position + padded(num) > num_bytes:
        raise UnusualHeader("the tar ends in a member")
    target = pax.get("linkpath", long.get("linkpath", _text(link))) if meaning.endswith("link") else ""
    return Member(path, meaning, start, position, num, target)


@functools.lru_cache(maxsize=256)
def _check_numbers(owner: bytes, device: bytes) -> None:
    """Check that unused fields are numbers; cached, because the headers of one writer usually have equal fields."""
    for field in (owner[:8], owner[8:16], owner[16:], device[:8], device[8:]):
        _number(field)


def _number(field: bytes) -> int:
    """The value of a field: an octal number, or a non-negative base-256 number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise UnusualHeader("a field is not an octal number")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _records(content: bytes, size: int) -> dict[str, str]:
    """The values of a PAX header by keyword; each record is ``length keyword=value`` and a line end."""
    records: dict[str, str] = {}
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
            if keyword == b"size" and not (value.isdigit() and len(value) < 20):
                raise UnusualHeader("a size is not a number")
            try:
                records[keyword.decode()] = value.decode()
            except UnicodeDecodeError as error:
                raise UnusualHeader("a name is not UTF-8") from error
        else:
            records[""] = ""  # shows the caller that there was a header
        position = end
    if content[size:].strip(b"\0") or b"hdrcharset=" in content:
        raise UnusualHeader("a PAX header is damaged, or its names are not in UTF-8")
    return records


def members_by_tarfile(stream: IO[bytes] | HashedStream) -> Iterator[Member]:
    """Read the members of a tar with ``tarfile``. At each yield, the stream is at the member's content.

    Raises:
        TarError, EOFError, ValueError, OverflowError: the stream is not a tar, or a member is sparse or has a negative
            size.
    """
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as tar:
        for member in tar:
            check_member(member)
            kind: Kind = "folder" if member.isdir() else _KINDS.get(member.type, "special")
            size = member.size if kind == "file" else 0
            target = member.linkname if kind.endswith("link") else ""
            yield Member(member.name, kind, member.offset, member.offset_data, size, target)
            tar.members = []  # type: ignore[assignment]  # `tarfile` would keep a kilobyte per member


def check_member(member: tarfile.TarInfo) -> None:
    """Check that the size of a member is the number of its bytes in the tar.

    Raises:
        TarError: the size is negative, so that a reader would go backwards; or the member is sparse, so that its size
            differs from the number of stored bytes.
    """
    if member.size < 0 or member.issparse():
        fault = "is sparse" if member.issparse() else "has a negative size"
        raise tarfile.ReadError(f"{member.name!r:.80} {fault}")
