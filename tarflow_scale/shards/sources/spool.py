"""A temporary copy of the images of a source that has no random access."""

import os
import tempfile
from typing import IO, Any

from tarflow_scale.errors import DataError

__all__ = ["Spool"]


class Spool:
    """A temporary file without a name, which worker processes can read; it vanishes when this process ends."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = tempfile.TemporaryFile(prefix="tarflow-scale-")  # noqa: SIM115
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def write(self, content: bytes) -> None:
        """Append; it can be read immediately.

        Raises:
            DataError: the file system is full.
        """
        assert self._file is not None
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"no room for a temporary copy of the images in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}
