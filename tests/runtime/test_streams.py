"""What is printed cannot stop the work, and the exit code says what became of it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tarflow_scale.shards.images import encode_png
from tests.conftest import TOP, train_arguments

FULL = "tarflow-scale: error: standard output must be writable (got: No space left on device); "
PREPARE = '"$PYTHON" -m tarflow_scale prepare source.kind=folder source.path="$IMAGES" shards.path="$DATA"'


def shell(script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", script],
        cwd=TOP,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of two images of one class."""
    path = tmp_path_factory.mktemp("images")
    (path / "a").mkdir()
    for i in range(2):
        (path / f"a/{i}.png").write_bytes(encode_png(np.full((1, 4, 4), i, np.uint8)))
    return str(path)


@pytest.mark.parametrize("at_once", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (f"{PREPARE} >/dev/full", 2, FULL),
        (f"{PREPARE} >&-", 0, ""),
        (f"{PREPARE} 2>/dev/full", 0, ""),
        (f"{PREPARE} 2>&-", 0, ""),
        (f"{PREPARE} >&- 2>&-", 0, ""),
        (f"{PREPARE} | true; exit ${{PIPESTATUS[0]}}", 0, ""),
    ],
    ids=["full", "closed", "errors_full", "errors_closed", "both_closed", "reader_gone"],
)
def test_a_data_set_is_packed_wherever_its_output_goes(
    redirected: str, code: int, said: str, at_once: str, images: str, tmp_path: Path
) -> None:
    result = shell(redirected, PYTHONUNBUFFERED=at_once, IMAGES=images, DATA=str(tmp_path / "packed"))
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == bool(said)
    assert (tmp_path / "packed/train/manifest.json").exists()


PLAN = "plan configs/train/imagenet64-conditional.yaml --gpus 8 --gpu h100 --image-size 64 --classes 1000"


@pytest.mark.parametrize(
    "command",
    [
        '"$PYTHON" -m tarflow_scale --help',
        '"$PYTHON" -m tarflow_scale prepare --help',
        f"{PREPARE} --dry-run",
        pytest.param(f'"$PYTHON" -m tarflow_scale {PLAN}', marks=pytest.mark.slow),
    ],
    ids=["help", "help_of_a_verb", "dry_run", "plan"],
)
def test_output_that_was_lost_is_an_error_for_what_only_prints(command: str, images: str, tmp_path: Path) -> None:
    variables = {"IMAGES": images, "DATA": str(tmp_path / "packed")}
    result = shell(f"{command} >/dev/full", **variables)
    assert result.returncode == 2
    assert result.stderr.startswith(FULL)
    assert result.stderr.count("\n") == 1
    assert shell(f"{command} | true; exit ${{PIPESTATUS[0]}}", **variables).returncode == 0


def test_an_error_keeps_its_code_and_is_the_only_line() -> None:
    command = '"$PYTHON" -m tarflow_scale train no/such.yaml'
    for redirected in (f"{command} >/dev/full", f"{command} >&-", f"{command} 2>/dev/full", f"{command} 2>&-"):
        result = shell(redirected)
        assert result.returncode == 2
        assert result.stdout == ""  # Python prints there what is for a closed standard error
        assert result.stderr.count("\n") == (0 if "2>" in redirected else 1)


def test_a_c_locale_prints_names_that_it_cannot_encode(images: str, tmp_path: Path) -> None:
    result = shell(PREPARE, IMAGES=images, DATA=str(tmp_path / "größe"), LC_ALL="C", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "größe/train/manifest.json").exists()
    assert "gr\\xf6\\xdfe" in result.stdout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("redirected", "code"), [(">/dev/full", 2), (">&- 2>&-", 0), ("| true; exit ${PIPESTATUS[0]}", 0)]
)
def test_ranks_finish_and_register_wherever_their_output_goes(
    redirected: str, code: int, digits: Path, tmp_path: Path
) -> None:
    more = ["training.total_images=64", "checkpoint.every_images=32"]
    _, *arguments = train_arguments(digits, tmp_path / "run", tmp_path / "registry", *more)
    words = shlex.join(arguments)
    (tmp_path / "empty.yaml").write_text("{}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = shell(f"launch/torchrun.sh 2 {tmp_path}/empty.yaml {words} {redirected}", PATH=path)
    assert result.returncode == code, result.stderr
    assert (FULL in result.stderr) == (code == 2)
    assert "Traceback" not in result.stderr
    assert (tmp_path / "registry").exists()
