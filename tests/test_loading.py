"""``tarflow_scale.load``: what a notebook user types."""

import subprocess
import sys

import pytest
import torch

import tarflow_scale
from tarflow_scale.errors import UserError
from tests.conftest import Trained


def test_load_from_a_registry_and_from_a_folder(trained: Trained) -> None:
    by_name = tarflow_scale.load("small@latest", registry=str(trained.registry))
    by_path = tarflow_scale.load(str(trained.run / "model"))
    x, y = torch.zeros(2, 1, 8, 8), torch.tensor([0, 9])
    assert torch.equal(by_name.log_prob(x, y), by_path.log_prob(x, y))
    assert by_name.sample(3, torch.tensor([1, 2, 3])).shape == (3, 1, 8, 8)


def test_what_is_not_there(trained: Trained, tmp_path: object) -> None:
    with pytest.raises(UserError, match="a version is model@version"):
        tarflow_scale.load("small", registry=str(trained.registry))
    with pytest.raises(UserError, match="is not a saved flow"):
        tarflow_scale.load(str(tmp_path))


def test_importing_the_package_is_light() -> None:
    before = "import sys, tarflow_scale; assert 'torch' not in sys.modules"
    after = "tarflow_scale.load; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", f"{before}; {after}"], check=False).returncode == 0
