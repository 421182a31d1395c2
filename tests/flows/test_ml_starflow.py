"""The options of STARFlow compute what its public code computes: z, log-determinant and samples, guided or not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows import TarFlow
from tarflow_scale.flows.tarflow import patchify
from tarflow_scale.sampling.decode import Schedule, TarFlowDecoder
from tests.flows.ml_starflow_reference import (
    CASES,
    CHANNELS,
    CHUNK,
    HEAD_WIDTH,
    NUM_CLASSES,
    WIDTH,
    Case,
    compute,
    inputs,
    layers_of,
    state_dict,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LAYER_NAMES = {
    "attention.norm": "attention_norm",
    "attention.qkv": "qkv",
    "attention.proj": "attention_out",
    "attention.query_norm": "query_norm",
    "attention.key_norm": "key_norm",
    "mlp.norm": "mlp_norm",
    "mlp.main.0": "mlp_in",
    "mlp.main.2": "mlp_out",
    "mlp.down_proj": "mlp_out",
}

Fixture = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def stored() -> Fixture:
    with np.load(Path(__file__).with_name("ml_starflow_fixture.npz")) as file:
        return dict(file)


def renamed(public: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The weights under the names of `TarFlow`."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in public.items():
        head, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        value, block = tensor, f"{head}.{number}"
        if rest in ("proj_in.weight", "proj_out.weight", "proj_out.bias", "sos_embed"):
            value = reordered(rest, value, case.patch_size)
        rms = rest.endswith("norm.weight") and f"{block}.{rest.removesuffix('weight')}bias" not in public
        value = value + 1 if rms else value
        if rest == "sos_embed":
            tensors[f"{block}.start_token"] = value.flatten()
        elif rest == "proj_txt.weight":
            tensors[f"{block}.class_embedding"] = value.mT + public[f"{block}.proj_txt.bias"]
        elif rest.startswith("attn_blocks."):
            _, layer, inner = rest.split(".", 2)
            if inner.startswith("mlp.gate_proj."):
                kind = inner.rpartition(".")[2]
                up = public[f"{block}.attn_blocks.{layer}.mlp.up_proj.{kind}"]
                tensors[f"{block}.layers.{layer}.mlp_in.{kind}"] = torch.cat([value, up])
            elif not inner.startswith("mlp.up_proj."):
                module, _, kind = inner.rpartition(".")
                tensors[f"{block}.layers.{layer}.{LAYER_NAMES[module]}.{kind}"] = value
        elif rest != "proj_txt.bias":
            tensors[f"{block}.{rest}"] = value
    return tensors


def reordered(name: str, value: Tensor, patch: int) -> Tensor:
    """Features of a patch from the order (row, column, channel) to (channel, row, column)."""
    axis = 1 if name == "proj_in.weight" else -1 if name == "sos_embed" else 0
    halves = value.chunk(2, dim=axis) if name.startswith("proj_out") else (value,)
    order = torch.arange(CHANNELS * patch * patch).view(patch, patch, CHANNELS).permute(2, 0, 1).flatten()
    return torch.cat([half.index_select(axis, order) for half in halves], dim=axis)


def flow_of(fixture: Fixture, name: str, dtype: torch.dtype) -> TarFlow:
    case = CASES[name]
    sizes = {"patch_size": case.patch_size, "width": WIDTH, "head_width": HEAD_WIDTH}
    options = {"layers_per_block": layers_of(case), "class_conditional": case.conditional}
    config = TarFlowConfig.model_validate(sizes | options | dict(case.ours))
    side = case.trained * case.patch_size
    flow = TarFlow((CHANNELS, side, side), NUM_CLASSES if case.conditional else None, config)
    lines = (line.split() for line in fixture[f"{name}/shapes"].tolist())
    public = state_dict({key: tuple(map(int, shape)) for key, *shape in lines})
    flow.double().load_state_dict(renamed(public, case))
    height, width = (case.patch_size * length for length in case.grid)
    return flow.resized(height, width).to(dtype).eval()


@torch.no_grad()
def differences(fixture: Fixture, name: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest absolute difference from the public code, by name of the result."""
    case, flow, given = CASES[name], flow_of(fixture, name, dtype), inputs(CASES[name])
    z, log_det = flow(given["x"].to(dtype), given["y"] if case.conditional else None)
    found = {"z": z - tokens(flow, fixture[f"{name}/z"]), "log_det": log_det - torch.tensor(fixture[f"{name}/log_det"])}
    latents, y = tokens(flow, given["latents"].numpy()).to(dtype), given["sample_y"] if case.conditional else None
    decoder = TarFlowDecoder(flow)
    for scale in (0.0, *case.guidance):
        guidance = Guidance(scale=scale, rule="gaussian") if scale else None
        expected = torch.from_numpy(fixture[f"{name}/sample_{scale}"])
        chunks = [Schedule(chunk=CHUNK, planned=CHUNK)] * len(flow.blocks)
        found[f"sample_{scale}"] = flow.inverse(latents, y, guidance) - expected
        found[f"decoded_{scale}"] = decoder(latents, y, guidance)[0] - expected
        found[f"chunks_{scale}"] = decoder(latents, y, guidance, chunks)[0] - torch.from_numpy(
            fixture.get(f"{name}/chunks_{scale}", fixture[f"{name}/sample_{scale}"])
        )
    return {key: float(value.abs().max()) for key, value in found.items()}


def tokens(flow: TarFlow, image: np.ndarray) -> Tensor:
    """Latents in the shape of an image as ``(B, T D)`` in the order of tokens."""
    return patchify(torch.from_numpy(image), flow.patch_size).flatten(1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_public_code_computes(stored: Fixture, name: str, dtype: torch.dtype) -> None:
    found = differences(stored, name, dtype)
    assert max(found.values()) <= TOLERANCE[dtype], found


def test_the_comparison_can_fail(stored: Fixture) -> None:
    """Guided samples differ from plain ones, and each case from the others, by much more than the tolerance."""
    for name, case in CASES.items():
        for scale in case.guidance:
            assert np.abs(stored[f"{name}/sample_{scale}"] - stored[f"{name}/sample_0.0"]).max() > 1e-2
    firsts = [stored[f"{name}/sample_0.0"][..., :3, :4] for name in ("published", "wide_top", "grouped", "other_size")]
    for i, first in enumerate(firsts):
        for second in firsts[:i]:
            assert np.abs(first - second).max() > 1e-2


@pytest.mark.reference
def test_a_checkout_computes_what_is_stored(ml_starflow: Path, stored: Fixture) -> None:
    live = compute(ml_starflow)
    assert live.keys() == stored.keys()
    for name in CASES:
        assert max(differences(live, name, torch.float64).values()) <= TOLERANCE[torch.float64]
    for key in live:
        if live[key].dtype.kind == "f":
            assert np.abs(live[key] - stored[key]).max() <= TOLERANCE[torch.float64], key
