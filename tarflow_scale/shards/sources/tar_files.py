"""Find the tars that a path names: all tars below a folder, a single tar, or the tars that match a pattern."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tarflow_scale import storage
from tarflow_scale.errors import DataError
from tarflow_scale.shards.manifest import MANIFEST_NAME
from tarflow_scale.shards.sources.junk import junk_kind, sort_files

__all__ = ["FoundTars", "find_tars", "refuse_compressed", "tars_of_folder"]

_COMPRESSED = {
    **dict.fromkeys((".tar.gz", ".tgz"), "gunzip"),
    **dict.fromkeys((".tar.zst", ".tzst"), "zstd -d"),
    **dict.fromkeys((".tar.xz", ".txz"), "unxz"),
    **dict.fromkeys((".tar.bz2", ".tbz", ".tbz2"), "bunzip2"),
    ".tar.lz4": "lz4 -d",
}
_MAGIC = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "zstd -d", b"\xfd7zXZ": "unxz", b"BZh": "bunzip2"}
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FoundTars:
    """The tars of a source.

    Args:
        root: folder or URL that contains all tars.
        names: paths of the tars below ``root``.
        ignored: number of other files below ``root``, by kind.
        lines: lines to be printed before packing.
    """

    root: str
    names: list[str]
    ignored: Counter[str]
    lines: tuple[str, ...] = ()


def find_tars(path: str) -> FoundTars:
    """Find the tars that ``source.path`` names.

    Args:
        path: a folder, a tar, or a pattern. In a pattern, ``{000..031}`` and ``{a,b}`` are expanded as by webdataset,
            ``::`` separates patterns, ``*``, ``?`` and ``[ab]`` match within one name, and ``**`` matches any number of
            folders.

    Raises:
        DataError: there are no tars, a tar is missing, or a tar is compressed.
    """
    if storage.exists(path):
        return _of_folder(path) if storage.is_folder(path) else _of_names([path])
    if not _WILD.search(path) and not re.search(r"[{]|::", path):
        raise DataError(f"there is no {path}; check source.path")
    return _of_names([tar for pattern in _expanded(path) for tar in _matches(pattern, path)])


def tars_of_folder(path: str) -> FoundTars:
    """Find the tars directly in a folder; tars in folders below it are counted as other files.

    Raises:
        DataError: the folder itself has no tars, or a tar is compressed.
    """
    tars = _of_folder(path)
    names = [name for name in tars.names if "/" not in name]
    below = [name for name in tars.names if "/" in name]
    if not names:
        raise DataError(f"no .tar directly in {path} (got {below[0]} in a subfolder); index each folder separately")
    return FoundTars(path, names, tars.ignored + Counter({"tar in a subfolder": len(below)}))


def refuse_compressed(name: str, first: bytes = b"") -> None:
    """Refuse a compressed tar, because it does not allow reads at arbitrary positions.

    Args:
        name: name of the tar.
        first: first bytes of the tar; if empty, only the name is checked.

    Raises:
        DataError: the tar is compressed.
    """
    command = next((tool for end, tool in _COMPRESSED.items() if name.lower().endswith(end)), None)
    command = command or next((tool for magic, tool in _MAGIC.items() if first.startswith(magic)), None)
    if command is not None:
        raise DataError(
            f"a tar must not be compressed, because its samples are read in any order (got {name}); run {command} on it"
        )


def _of_folder(path: str) -> FoundTars:
    files = [file.name for file in storage.walk(path)]
    for name in files:
        if junk_kind(name) is None:
            refuse_compressed(name)
    names, ignored = sort_files(files, (".tar",))
    if not names:
        raise DataError(f"no .tar file in {path}; check source.path")
    # Data sets that `prepare` packed below this folder are left out, unless there are no other tars.
    packed = {name.rpartition("/")[0] for name in files if name.endswith(f"/{MANIFEST_NAME}")}
    unpacked = [name for name in names if name.rpartition("/")[0] not in packed]
    if not unpacked or len(unpacked) == len(names):
        return FoundTars(path, names, ignored)
    left_out = sorted(packed & {name.rpartition("/")[0] for name in names})
    line = f"left out: {', '.join(left_out)} (packed data set); give it as source.path to pack it again"
    return FoundTars(path, unpacked, ignored, (line,))


def _of_names(paths: list[str]) -> FoundTars:
    for path in paths:
        refuse_compressed(path)
    double, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise DataError(f"source.path must name every tar only once (got {double} {times} times); correct the pattern")
    folders = [path.rpartition("/")[0] for path in paths]
    root = folders[0] if len(set(folders)) == 1 else _common(folders)
    below = len(root) + 1 if root else 0
    return FoundTars(root or ("/" if paths[0].startswith("/") else "."), [path[below:] for path in paths], Counter())


def _common(folders: list[str]) -> str:
    """The deepest folder that contains all folders.

    Raises:
        DataError: the paths are in different stores.
    """
    parts = [folder.split("/") for folder in folders]
    same = 0
    while same < min(map(len, parts)) and len({part[same] for part in parts}) == 1:
        same += 1
    root = "/".join(parts[0][:same])
    if "://" in folders[0] and not root.partition("://")[2]:
        raise DataError(f"all tars must be in one store (got {folders[0]} and {folders[-1]}); copy them to one store")
    return root


def _expanded(path: str) -> list[str]:
    """Expand a pattern with ``{..}`` or ``::`` into patterns without them."""
    if not re.search(r"[{]|::", path):
        return [path]
    from webdataset.shardlists import expand_urls  # here, because it takes seconds and imports torch

    try:
        return [str(url) for url in expand_urls(path)]
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"source.path must be a folder, a tar or a pattern such as tars/{{00..31}}.tar (got {path}: {error}); "
            f"correct it"
        ) from error


def _matches(pattern: str, path: str) -> list[str]:
    """Sorted paths that match a pattern without braces.

    Raises:
        DataError: nothing matches.
    """
    if not _WILD.search(pattern):
        if not storage.exists(pattern):
            raise DataError(f"there is no {pattern} (of source.path={path}); check the pattern")
        return [pattern]
    parts = pattern.split("/")
    fixed = next(number for number, part in enumerate(parts) if _WILD.search(part))
    root = "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")
    files = storage.walk(root) if storage.is_folder(root) else []
    names = [file.name for file in files if junk_kind(file.name) is None]
    names = [name for name in names if _fits(name.split("/"), parts[fixed:])]
    if not names:
        raise DataError(f"source.path must match tars (got {pattern}, which matches nothing); correct it")
    return [name if root == "." else f"{root.rstrip('/')}/{name}" for name in names]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match the parts of a pattern; ``**`` matches any number of folders."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
