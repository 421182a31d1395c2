"""A lease is a lock that expires. It works on any store that supports create-if-absent.

The process that creates ``<path>/<n>.json`` is holder n. It renews the file regularly; after the file has expired,
another process may become holder n + 1. Expiry compares the clocks of machines, so two processes may hold a lease at
the same time. A lease only avoids duplicate work; the event log prevents duplicate events.
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
    """A lease; entering it returns None if another process holds it.

    Args:
        path: folder or URL.
        seconds: time after which a lease expires unless it is renewed; the holder renews it every quarter of this time.
    """

    def __init__(self, path: str, seconds: float = 600) -> None:
        self._path = path
        self._seconds = seconds
        self._location: str | None = None
        self._done = threading.Event()
        self._renewal: threading.Thread | None = None

    def __enter__(self) -> "Lease | None":
        """Try to acquire the lease."""
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
        """Release the lease."""
        if self._location is not None and self._renewal is not None:
            self._done.set()
            self._renewal.join()
            storage.remove(self._location)

    def _renew(self) -> None:
        assert self._location is not None
        while not self._done.wait(self._seconds / 4):
            with suppress(StorageError):  # the next renewal may succeed; otherwise the lease expires
                storage.write_bytes(self._location, self._content())

    def _content(self) -> bytes:
        return json.dumps({"until": time.time() + self._seconds}).encode()

    def _expired(self, name: str) -> bool:
        location = storage.join(self._path, name)
        try:
            return json.loads(storage.read_bytes(location))["until"] < time.time()
        except StorageError:
            return False  # it was released after the listing; the next attempt can acquire it
