"""Encoding in separate processes: all files are in the right order, also if processes die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tarflow_scale.shards.encoding import Encoder
from tarflow_scale.shards.images import decode_image, encode_image
from tests.forking import HANG_SECONDS

BATCHES = [np.random.default_rng(n).integers(0, 256, (5, 3, 16, 16), np.uint8) for n in range(12)]


def encoding_processes() -> list[int]:
    """The child processes of this process that encode."""
    children = [
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    return [pid for pid in children if b"tarflow_scale.shards.encoding" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("num_processes", [1, 3])
def test_files_come_in_the_order_of_images(num_processes: int) -> None:
    encoder = Encoder(num_processes, "png", 95)
    expected = [encode_image(image, "png") for images in BATCHES for image in images]
    assert list(encoder.encoded(iter(BATCHES))) == expected
    assert list(encoder.encoded(iter(BATCHES[:2]))) == expected[:10]  # once more, by the same processes


def test_a_killed_process_costs_nothing_but_a_warning() -> None:
    encoder = Encoder(1, "webp", 95)

    def batches() -> Iterator[NDArray[np.uint8]]:
        for number, images in enumerate(BATCHES):
            if number in (5, 9):  # more than may wait, so that the process has encoded something
                (process,) = encoding_processes()
                os.kill(process, signal.SIGKILL)
            yield images

    with pytest.warns(UserWarning, match="encodes images died") as warned:
        files = list(encoder.encoded(batches()))
    assert len(warned) == 2
    images = np.concatenate(BATCHES)
    assert all((decode_image(file, "x") == image).all() for file, image in zip(files, images, strict=True))


def test_batches_do_not_pile_up() -> None:
    begun = 0

    def batches() -> Iterator[NDArray[np.uint8]]:
        nonlocal begun
        for _ in range(100):
            begun += 1
            yield BATCHES[0]

    encoder = Encoder(1, "png", 95)
    for done, _ in enumerate(encoder.encoded(batches())):
        assert begun - done // 5 <= 4  # two wait, one is being encoded, one was just made


def test_what_makes_the_batches_fails_as_it_does() -> None:
    def batches() -> Iterator[NDArray[np.uint8]]:
        yield BATCHES[0]
        raise KeyError("bad")

    with pytest.raises(KeyError, match="bad"):
        list(Encoder(1, "png", 95).encoded(batches()))


def test_where_no_process_starts_images_are_encoded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.warns(UserWarning, match="this process now encodes the images") as warned:
        files = list(Encoder(1, "png", 95).encoded(iter(BATCHES)))
    assert len(warned) == 1  # it is not tried again
    assert files == [encode_image(image, "png") for images in BATCHES for image in images]


def test_processes_end_with_the_encoder() -> None:
    encoder = Encoder(1, "png", 95)
    list(encoder.encoded(BATCHES[:1]))
    assert len(encoding_processes()) == 1
    del encoder
    assert not encoding_processes()


def test_processes_end_with_a_killed_maker() -> None:
    code = """
import numpy, os, signal
from tarflow_scale.shards.encoding import Encoder
from tests.forking import HANG_SECONDS
encoder = Encoder(1, "png", 95)
list(encoder.encoded([numpy.zeros((2, 1, 8, 8), numpy.uint8)]))
print(encoder._processes._idle[0]._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    process = Path(f"/proc/{killed.stdout.strip()}/cmdline")
    deadline = time.monotonic() + HANG_SECONDS
    while process.exists() and process.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
