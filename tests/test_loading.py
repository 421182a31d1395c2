"""``tarflow_scale.load``: what a notebook user types."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tarflow_scale
from tarflow_scale.errors import UserError
from tarflow_scale.flows import save_flow
from tests.conftest import Trained
from tests.flows.catalogue import FLOWS


def test_load_from_a_registry_and_from_a_folder(trained: Trained) -> None:
    by_name = tarflow_scale.load("small@latest", registry=str(trained.registry))
    by_path = tarflow_scale.load(str(trained.run / "model"))
    x, y = torch.zeros(2, 1, 8, 8), torch.tensor([0, 9])
    assert torch.equal(by_name.log_prob(x, y), by_path.log_prob(x, y))
    assert by_name.sample(3, torch.tensor([1, 2, 3])).shape == (3, 1, 8, 8)


def test_what_is_not_there(trained: Trained, tmp_path: object) -> None:
    with pytest.raises(UserError, match="a version must be given as model@version"):
        tarflow_scale.load("small", registry=str(trained.registry))
    with pytest.raises(UserError, match="is not a saved flow"):
        tarflow_scale.load(str(tmp_path))


def test_paths_are_taken_as_strings_are(trained: Trained) -> None:
    flow = tarflow_scale.load("small@1", registry=trained.registry)
    assert torch.equal(tarflow_scale.load(trained.run / "model").sample(1, 0, seed=0), flow.sample(1, 0, seed=0))


def test_a_version_without_a_registry_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(got 'digits@1' without one\); call load\('digits@1', registry=PATH\)$"):
        tarflow_scale.load("digits@1")


def test_a_loaded_version_knows_its_classes(trained: Trained, tmp_path: Path) -> None:
    flow = tarflow_scale.load("small@1", registry=trained.registry)
    assert flow.class_names == tuple("0123456789")
    assert torch.equal(flow.sample(2, y=["3", "7"], seed=0), flow.sample(2, torch.tensor([3, 7]), seed=0))
    with pytest.raises(ValueError, match=r"labels must be class names or numbers \(got seven\); the names are 0, 1, "):
        flow.sample(2, y="seven")
    save_flow(flow, str(tmp_path))
    assert tarflow_scale.load(tmp_path).class_names == flow.class_names
    assert tarflow_scale.load(trained.run / "model").class_names == flow.class_names
    flow.class_names = ()
    save_flow(flow, tmp_path)
    (tmp_path / "version.json").write_text("[]")
    with pytest.raises(UserError, match=r"version.json must be a file that 'models export' wrote \(got TypeError"):
        tarflow_scale.load(tmp_path)
    (tmp_path / "version.json").unlink()
    by_path = tarflow_scale.load(tmp_path)
    with pytest.raises(ValueError, match="labels must be numbers if the names of classes are not known"):
        by_path.sample(2, y="7")


def test_a_flow_with_rotary_positions_samples_another_size(trained: Trained, tmp_path: Path) -> None:
    (case,) = (case for case in FLOWS if case.name == "tarflow_starflow")
    save_flow(case.flow(torch.float32), tmp_path)
    flow, larger = tarflow_scale.load(tmp_path), tarflow_scale.load(tmp_path, size=(6, 8))
    assert flow.sample(2, 1, seed=0).shape == (2, 1, 4, 6)
    x = larger.sample(2, 1, seed=0)
    assert x.shape == (2, 1, 6, 8)
    assert larger.decoder is not None  # the fast one
    with torch.no_grad():
        z, _ = larger(x, torch.tensor([1, 1]))
        assert (larger.inverse(z, 1) - x).abs().max() < 1e-4
    with pytest.raises(UserError, match=r"size: image height and width must be multiples of model.patch_size"):
        tarflow_scale.load(tmp_path, size=(5, 8))
    with pytest.raises(UserError, match="size: images of another size need model.positions=rotary"):
        tarflow_scale.load("small@1", registry=trained.registry, size=(16, 16))


def test_what_is_loaded_in_inference_mode_works_outside(trained: Trained) -> None:
    with torch.inference_mode():
        flow = tarflow_scale.load("small@1", registry=trained.registry)
        expected = flow.sample(2, 1, seed=0)
    assert torch.equal(flow.sample(2, 1, seed=0), expected)
    flow.log_prob(expected.clone(), 1).sum().backward()
    assert all(bool((one.grad != 0).any()) for one in flow.parameters() if one.grad is not None)


def test_importing_the_package_is_light() -> None:
    before = "import sys, tarflow_scale; assert 'torch' not in sys.modules"
    after = "tarflow_scale.load; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", f"{before}; {after}"], check=False).returncode == 0
