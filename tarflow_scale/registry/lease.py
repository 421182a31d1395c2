"""The right to do something alone for a while, on any store that has create-if-absent.

Holder n of a lease is whoever creates ``<path>/<n>.json``; it writes the file again from time to time, and one that has
stopped doing so may be succeeded by holder n + 1. Clocks of machines decide when, so a lease saves work; what must
happen once at the most is settled in the log.
"""

import json
import threading
import time
from contextlib import AbstractContextManager, suppress
from types import TracebackType

from tarflow_scale import storage
from tarflow_scale.errors import StorageError

__all__ = ["Lease"]


class Lease(AbstractContextManager["Lease | None"]):
    """A lease; entering gives None where somebody else holds it.

    Args:
        path: folder or URL.
        seconds: that a holder who went away keeps others waiting; it writes four times as often.
    """

    def __init__(self, path: str, seconds: float = 600) -> None:
        self._path = path
        self._seconds = seconds
        self._location: str | None = None
        self._done = threading.Event()
        self._renewal: threading.Thread | None = None

    def __enter__(self) -> "Lease | None":
        """Try to become the holder."""
        names = storage.list_names(self._path)
        if names and not self._expired(names[-1]):
            return None
        number = int(names[-1].removesuffix(".json")) + 1 if names else 0
        location = storage.join(self._path, f"{number:06d}.json")
        if not storage.create(location, self._content()):
            return None
        self._location = location
        self._renewal = threading.Thread(target=self._renew, daemon=True)
        self._renewal.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others have it."""
        if self._location is not None and self._renewal is not None:
            self._done.set()
            self._renewal.join()
            storage.remove(self._location)

    def _renew(self) -> None:
        assert self._location is not None
        while not self._done.wait(self._seconds / 4):
            with suppress(StorageError):  # the next time may do; if none does, somebody else takes over
                storage.write_bytes(self._location, self._content())

    def _content(self) -> bytes:
        return json.dumps({"until": time.time() + self._seconds}).encode()

    def _expired(self, name: str) -> bool:
        location = storage.join(self._path, name)
        try:
            return json.loads(storage.read_bytes(location))["until"] < time.time()
        except StorageError:
            return False  # given back between two looks: the next look finds it free
