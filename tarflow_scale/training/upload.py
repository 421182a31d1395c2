"""Uploads checkpoints to a store in the background, during training.

Every rank copies the files that it wrote. Rank 0 waits until the store lists the files of all ranks, then writes the
manifest, so a checkpoint with a manifest is complete. Ranks do not communicate about uploads.
"""

import threading
import time
import warnings
from collections.abc import Callable, Sequence

from tarflow_scale import storage
from tarflow_scale.config.train import CheckpointConfig
from tarflow_scale.errors import StorageError, UserError
from tarflow_scale.runtime.distributed import is_main
from tarflow_scale.training.checkpoint import MANIFEST, CheckpointManifest, prune

__all__ = ["Uploader"]

_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 1.0
"""Wait after the first failed attempt. It doubles each time, so uploads survive half a minute of failures."""
_FILES_SECONDS = 3600.0
"""How long rank 0 waits for the files of other ranks."""


class Uploader:
    """Uploads one checkpoint at a time.

    Args:
        config: the section ``checkpoint``, with the target and the checkpoints to keep there.
        copy: function ``copy(local, remote)`` that copies one file.
    """

    def __init__(self, config: CheckpointConfig, copy: Callable[[str, str], None] = storage.copy_file) -> None:
        self._config = config
        self._copy = copy
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    @property
    def busy(self) -> bool:
        """Whether an upload is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, folder: str, own_files: Sequence[str]) -> None:
        """Start to upload a complete checkpoint after the previous upload ends; ``own_files`` are this rank's files."""
        self.wait()
        path = self._config.upload_path
        if path is not None:
            target = storage.join(path, folder.rsplit("/", 1)[-1])
            self._thread = threading.Thread(target=self._run, args=(folder, target, own_files), name="upload")
            self._thread.start()

    def wait(self) -> None:
        """Wait for the running upload, if there is one; warn if it failed. Training continues either way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            warnings.warn(f"a checkpoint was not uploaded: {self._failure}", stacklevel=2)
            self._failure = None

    def _run(self, folder: str, target: str, own_files: Sequence[str]) -> None:
        try:
            for file in own_files:
                _retrying(lambda file=file: self._copy(storage.join(folder, file), storage.join(target, file)))
            if is_main():
                location = storage.join(folder, MANIFEST)
                content = storage.read_bytes(location)
                manifest = CheckpointManifest.from_json(content, location, StorageError)
                self._await_all(target, {file: record.bytes for file, record in manifest.files.items()})
                _retrying(lambda: storage.write_bytes(storage.join(target, MANIFEST), content))
                assert self._config.upload_path is not None
                prune(self._config.upload_path, self._config)
        except UserError as error:
            self._failure = str(error)

    def _await_all(self, target: str, sizes: dict[str, int]) -> None:
        started = time.monotonic()
        while not sizes.items() <= self._listed(target).items():
            if time.monotonic() - started > _FILES_SECONDS:
                raise StorageError(
                    f"{target} must have the files of all ranks within {_FILES_SECONDS:g} s (got only some of them); "
                    f"look for failed uploads in the output of the other ranks"
                )
            time.sleep(_FIRST_WAIT_SECONDS / 2)

    @staticmethod
    def _listed(target: str) -> dict[str, int]:
        try:
            return storage.list_sizes(target)
        except StorageError:  # the folder does not exist yet, or the store has a temporary failure
            return {}


def _retrying(write: Callable[[], None]) -> None:
    storage.retrying(write, _ATTEMPTS, _FIRST_WAIT_SECONDS)
