"""A file system without hard links, for processes that are started on it: a library loaded before the C library.

It refuses calls as FAT, CIFS and many file systems of FUSE do. A real mount needs rights that tests do not have.
"""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

__all__ = ["needs_compiler", "without_links"]

_SOURCE = """
#define _GNU_SOURCE
#include <errno.h>
static int refused(int number) { errno = number; return -1; }
int link(const char *a, const char *b) { return refused(LINK); }
int linkat(int a, const char *b, int c, const char *d, int e) { return refused(LINK); }
#ifdef RENAME
int renameat2(int a, const char *b, int c, const char *d, unsigned int e) { return refused(RENAME); }
#endif
"""

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to make a file system lack calls")


@functools.cache
def without_links(link: str = "EPERM", rename: str | None = None) -> dict[str, str]:
    """Environment of a process in which hard links end with an error, and ``renameat2`` too if one is named."""
    folder = Path(tempfile.mkdtemp(prefix="tarflow-scale-"))
    library = folder / "linkless.so"
    names = [f"-DLINK={link}", *([] if rename is None else [f"-DRENAME={rename}"])]
    source = ["gcc", "-shared", "-fPIC", *names, "-x", "c", "-", "-o", str(library)]
    subprocess.run(source, input=_SOURCE, text=True, check=True)
    return {"LD_PRELOAD": str(library)}
