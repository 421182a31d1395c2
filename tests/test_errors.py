"""What an error tells to install: a command that works from a checkout, made in one place."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tarflow_scale import errors
from tarflow_scale.config.model import ContinuousConfig, IAFConfig, MAFConfig
from tarflow_scale.errors import UserError
from tarflow_scale.flows import build
from tarflow_scale.metrics.dinov2 import DINOv2Extractor
from tarflow_scale.shards.sources.parquet import _open
from tarflow_scale.verbs.score import driver
from tests.conftest import TOP

CASES: dict[str, tuple[str, str, Callable[[], object]]] = {
    "model.kind=maf": ("zuko", "flows", lambda: build(MAFConfig(class_conditional=False), (3,))),
    "model.kind=iaf": ("zuko", "flows", lambda: build(IAFConfig(class_conditional=False), (3,))),
    "model.kind=continuous": ("torchdiffeq", "flows", lambda: build(ContinuousConfig(class_conditional=False), (3,))),
    "extractor dinov2-vitl14": ("timm", "dinov2", lambda: DINOv2Extractor("dinov2-vitl14", ["dinov2"], "none.pth")),
    "scoring.format=parquet": ("pyarrow", "parquet", driver._pyarrow),
    "source.kind=parquet": ("pyarrow", "parquet", lambda: _open("none.parquet")),
}


@pytest.mark.parametrize("what", CASES)
def test_a_missing_package_is_told_with_a_command_that_works_from_a_checkout(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, extra, use = CASES[what]
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        use()
    assert str(caught.value) == (
        f"{what} needs the package {package} (it is not installed); run: pip install -e '{TOP.resolve()}[{extra}]'"
    )
    extras = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith(package) for requirement in extras[extra])


def test_an_installed_package_is_completed_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no checkout around a package that was installed from a wheel."""
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages/tarflow_scale/errors.py"))
    assert errors.install_extra("flows") == "pip install 'tarflow-scale[flows]'"


def test_nothing_names_a_package_of_an_index_that_has_none() -> None:
    found = subprocess.run(
        ["git", "grep", "-lF", "tarflow-scale["], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert set(found.stdout.split()) <= {"tarflow_scale/errors.py", "tests/test_errors.py"}
    extras = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in ("README.md", "configs/prepare/parquet.yaml", "launch/ray/cluster.yaml", "launch/ray/aws.yaml"):
        named = re.findall(r"pip install -e '\.\[(\w+)\]'", (TOP / page).read_text())
        assert named
        assert set(named) <= set(extras)
