"""Files that operating systems and programs leave among images, and kinds of files in words."""

import re

__all__ = ["junk_kind", "kind_of"]

_JUNK = re.compile(
    r"(?:^|/)(?:(?P<fork>\._[^/]*)"
    r"|(?P<other>\.(?!\.?(?:/|$))[^/]*|__MACOSX|@eaDir|\$RECYCLE\.BIN|lost\+found|(?i:thumbs\.db|desktop\.ini)))(?:/|$)"
)
"""Hidden files and folders, those of macOS, Synology, Windows and ext4."""


def junk_kind(path: str) -> str | None:
    """The kind of a hidden or system file: ``._*``, ``.DS_Store``, ``__MACOSX``; None for other paths."""
    match = _JUNK.search(path)
    return None if match is None else "._*" if match["fork"] else match["other"]


def kind_of(path: str) -> str:
    """The kind of a file in words: of `junk_kind`, or ``*.txt``, or its name if it has no extension."""
    base = path.rpartition("/")[2]
    return junk_kind(path) or (f"*.{base.rpartition('.')[2].lower()}" if "." in base[1:] else base)
