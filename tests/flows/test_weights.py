"""A flow on disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.errors import DataError
from tarflow_scale.flows import Flow, build, load_flow, save_flow
from tarflow_scale.records import PixelFormat
from tests.flows.catalogue import FLOWS

CONFIG = TarFlowConfig(patch_size=2, width=16, layers_per_block=(1, 1), head_width=8)


@pytest.fixture
def flow() -> Flow:
    torch.manual_seed(0)
    flow = build(CONFIG, (1, 4, 4), 3).eval()
    flow.pixels = PixelFormat(bit_depth=4, noise="uniform")
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_saved_flow_comes_back_bit_for_bit(flow: Flow, tmp_path: Path, place: str) -> None:
    path = str(tmp_path) if place == "local" else "memory://flow"
    save_flow(flow, path)
    state = torch.get_rng_state()
    loaded = load_flow(path)
    assert torch.equal(torch.get_rng_state(), state)
    x, y = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    assert torch.equal(flow.log_prob(x, y), loaded.log_prob(x, y))
    assert not loaded.training
    assert loaded.pixels == flow.pixels
    assert loaded.config == CONFIG


def test_damage_is_named(flow: Flow, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a saved flow \(config.json is missing\)"):
        load_flow(str(tmp_path))
    save_flow(flow, str(tmp_path))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(DataError, match="does not contain a valid flow"):
        load_flow(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(weights)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["model"]["width"] = 32
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="does not contain a valid flow"):
        load_flow(str(tmp_path))


def test_a_pickle_is_not_a_flow(flow: Flow, tmp_path: Path) -> None:
    save_flow(flow, str(tmp_path))
    torch.save(flow.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="does not contain a valid flow"):
        load_flow(str(tmp_path))


@pytest.mark.parametrize("kind", ["maf", "continuous"])
def test_a_flow_of_a_library_is_loaded_by_a_process_that_never_built_one(kind: str, tmp_path: Path) -> None:
    """Flows are built on the meta device; a library that is imported there would keep its tables there."""
    (case,) = (case for case in FLOWS if case.name == f"{kind}_conditional")
    save_flow(case.flow(torch.float32), str(tmp_path))
    code = f"from tarflow_scale.flows import load_flow; print(load_flow({str(tmp_path)!r}).sample(2).isfinite().all())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "tensor(True)\n", found.stderr
