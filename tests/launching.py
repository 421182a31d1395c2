"""What the tests of docker/ and launch/ share: command lines that must be understood, and changes to YAML."""

import copy
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from tarflow_scale import cli
from tests.conftest import TOP

__all__ = ["DELETE", "changed", "check_understood", "image_version", "pinned"]


class Change(Enum):
    """What is no value; in names of tests it is the same in every process."""

    DELETE = "deleted"


DELETE = Change.DELETE


def changed(tree: Any, path: Sequence[str | int], value: Any) -> Any:
    """A copy of the tree with one value replaced, added, or, by ``DELETE``, taken out."""
    result = copy.deepcopy(tree)
    inside = result
    for step in path[:-1]:
        inside = inside[step]
    if value is DELETE:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return result


def check_understood(
    words: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run a command of ours with --dry-run in an empty folder; what is missing may be data or models, never a key.

    Buckets become folders, so that nothing is asked of a store.
    """
    for name in ("configs", "evals", "launch"):
        if not (folder / name).exists():
            (folder / name).symlink_to(TOP / name)
    monkeypatch.chdir(folder)
    arguments = [re.sub(r"s3://[\w-]+", str(folder / "bucket"), word) for word in words]
    match arguments[0]:
        case "launch/torchrun.sh":
            monkeypatch.setenv("WORLD_SIZE", arguments[1])
            monkeypatch.setenv("RANK", "0")
            arguments = ["train", *arguments[2:]]
        case "tarflow-scale":
            arguments = arguments[1:]
        case other:
            pytest.fail(f"no command of ours: {other}")
    capsys.readouterr()
    try:
        code = cli.main([*arguments, "--dry-run"])
    except SystemExit as end:
        code = end.code
    errors = capsys.readouterr().err
    assert code in (0, 2), errors
    assert not re.search(r"unknown key|required key|Input should|cannot read the configuration|usage:", errors), errors


def pinned() -> dict[str, str]:
    """Versions by package, of docker/constraints.txt."""
    lines = (TOP / "docker/constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def image_version() -> str:
    """Version of the package, which is in the tags of the images."""
    from tarflow_scale import __version__

    return __version__
