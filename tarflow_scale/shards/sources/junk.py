"""Recognize files that operating systems and programs leave among images, and count ignored files by kind."""

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["junk_kind", "sort_files"]

_JUNK = re.compile(
    r"(?:^|/)(?:(?P<fork>\._[^/]*)"
    r"|(?P<other>\.(?!\.?(?:/|$))[^/]*|__MACOSX|@eaDir|\$RECYCLE\.BIN|lost\+found|(?i:thumbs\.db|desktop\.ini)))(?:/|$)"
)
"""Hidden files and folders, and files and folders that macOS, Synology, Windows and ext4 create."""


def junk_kind(path: str) -> str | None:
    """The kind of a hidden or system file, such as ``._*``, ``.DS_Store`` or ``__MACOSX``; None for any other path."""
    match = _JUNK.search(path)
    return None if match is None else "._*" if match["fork"] else match["other"]


def sort_files(paths: Sequence[str], suffixes: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """Choose the files with one of the suffixes, ignoring case; count all other files and all hidden files by kind.

    The kind of a file is its `junk_kind`, or else its extension, such as ``*.txt``, or else its name.
    """
    chosen = [path for path in paths if path.lower().endswith(suffixes) and junk_kind(path) is None]
    ignored: Counter[str] = Counter()
    for path in set(paths).difference(chosen):
        base = path.rpartition("/")[2]
        ignored[junk_kind(path) or (f"*.{base.rpartition('.')[2].lower()}" if "." in base[1:] else base)] += 1
    return chosen, ignored
