"""A temporary file for the images of a source without random access."""

import os
import tempfile
from typing import IO, Any

from tarflow_scale.errors import DataError

__all__ = ["Spool"]


class Spool:
    """A temporary file that has no name in the file system and is deleted when this process ends.

    Worker processes can read it at ``path`` while this process runs.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = tempfile.TemporaryFile(prefix="tarflow-scale-")  # noqa: SIM115
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def write(self, content: bytes) -> None:
        """Append bytes, which can be read immediately.

        Raises:
            DataError: the file system is full.
        """
        assert self._file is not None
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"no room for a temporary copy of the images in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR "
                f"to a folder with enough space"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}
