"""Encode images in separate processes while the next images are generated.

Threads would share the interpreter with the sampler. With a small model or a fast device, the sampler keeps the
interpreter busy, so the times for sampling and encoding would add up. The processes are started with ``python -m``,
because `multiprocessing` would import the main module of the generating process, with all its imports.
"""

import multiprocessing
import os
import subprocess
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tarflow_scale.runtime.processes import ignore_stop_signals
from tarflow_scale.shards.images import Codec, encode_image

__all__ = ["Encoder"]

_AHEAD = 2
"""Number of batches per process that may wait to be encoded; if more are waiting, the caller waits."""
_END_SECONDS = 10.0


class Encoder:
    """Encodes image batches in other processes, which start at the first batches and end when the encoder is deleted.

    Args:
        num_processes: maximum number of processes.
        codec, quality: see `encode_image`.
    """

    def __init__(self, num_processes: int, codec: Codec, quality: int) -> None:
        self._ahead = _AHEAD * num_processes
        self._threads = ThreadPoolExecutor(num_processes, "encoder")  # each waits for a process
        self._processes = _Processes(codec, quality)
        weakref.finalize(self, _end, self._threads, self._processes)

    def encoded(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[bytes]:
        """Yield the encoded file of every image, in order. Batches are encoded while the next batch is generated.

        Args:
            batches: batches of images, ``(B, C, H, W)`` uint8.
        """
        waiting: deque[Future[list[bytes]]] = deque()
        for images in batches:
            waiting.append(self._threads.submit(self._processes.encode, images))
            while len(waiting) > self._ahead or (waiting and waiting[0].done()):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


class _Processes:
    """The running processes, each of which serves one thread at a time."""

    def __init__(self, codec: Codec, quality: int) -> None:
        self._how = codec, quality
        self._idle: list[_Process] = []
        self._gave_up = False

    def encode(self, images: NDArray[np.uint8]) -> list[bytes]:
        """Encode a batch in another process; if that process dies, encode the batch in this process."""
        if self._gave_up:
            return _encode(images, *self._how)
        process = None
        try:
            try:
                process = self._idle.pop()
            except IndexError:
                process = _Process()
            files = process.encode(images, *self._how)
        except (OSError, EOFError) as error:
            self._gave_up = process is None or not process.has_encoded  # a new process would not start either
            warnings.warn(
                f"a process that encodes images died ({type(error).__name__}), perhaps because memory ran out; "
                + ("this process now encodes the images" if self._gave_up else "a new process is started"),
                stacklevel=2,
            )
            if process is not None:
                process.end()
            return _encode(images, *self._how)
        self._idle.append(process)
        return files

    def end(self) -> None:
        while self._idle:
            self._idle.pop().end()


class _Process:
    """A process ``python -m tarflow_scale.shards.encoding``, which ends when its connection is closed."""

    def __init__(self) -> None:
        self.has_encoded = False
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            path = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tarflow_scale.shards.encoding", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )

    def encode(self, images: NDArray[np.uint8], codec: Codec, quality: int) -> list[bytes]:
        self._connection.send((images, codec, quality))
        files: list[bytes] = self._connection.recv()
        self.has_encoded = True
        return files

    def end(self) -> None:
        self._connection.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _end(threads: ThreadPoolExecutor, processes: _Processes) -> None:
    threads.shutdown(wait=True, cancel_futures=True)
    processes.end()


def _encode(images: NDArray[np.uint8], codec: Codec, quality: int) -> list[bytes]:
    return [encode_image(image, codec, quality) for image in images]


def _serve(connection: Connection) -> None:
    ignore_stop_signals()  # this process ends when the connection is closed
    while True:
        try:
            request: tuple[Any, Any, Any] = connection.recv()
        except EOFError:
            return
        connection.send(_encode(*request))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
