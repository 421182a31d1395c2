"""Weights of apple/ml-tarflow: equal z, log-determinant and samples; files of other models are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_scale.config.sampling import Guidance
from tarflow_scale.errors import DataError
from tarflow_scale.flows import TarFlow, standard_normal_log_prob
from tarflow_scale.flows.ml_tarflow import flow_from_ml_tarflow, load_ml_tarflow
from tests.flows.ml_tarflow_reference import CASES, DENOISE_STD, as_state_dict, compute, inputs, state_dict

TOLERANCE = 1e-5
OUR_GUIDANCE = {"guidance": "scale", "annealed_guidance": "annealed", "attn_temp": "attention_temperature"}
OUR_WHAT = {"a": "log_scale", "b": "mean", "ab": "both"}

Fixture = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def stored() -> Fixture:
    with np.load(Path(__file__).with_name("ml_tarflow_fixture.npz")) as file:
        return dict(file)


def converted(fixture: Fixture, name: str) -> TarFlow:
    flow = flow_from_ml_tarflow(as_state_dict(fixture, name), name)
    assert isinstance(flow, TarFlow)
    return flow


def guidance(arguments: dict[str, object]) -> Guidance:
    ours = {OUR_GUIDANCE[key]: value for key, value in arguments.items() if key in OUR_GUIDANCE}
    return Guidance.model_validate(ours | {"what": OUR_WHAT[str(arguments.get("guide_what", "ab"))]})


@torch.no_grad()
def differences(fixture: Fixture, name: str) -> dict[str, float]:
    """Largest absolute difference from the public code, by name of the result."""
    case, flow, given = CASES[name], converted(fixture, name), inputs(CASES[name])
    y, sample_y = (given[key] if case.num_classes else None for key in ("y", "sample_y"))
    z, log_det = flow(given["x"], y)
    latents = given["latents"].flatten(1)
    if flow.log_std is None:
        expected_z, expected_log_det = fixture[f"{name}/z"], fixture[f"{name}/log_det_per_dim"]
    else:  # the public code leaves the scale out of both
        expected_z = fixture[f"{name}/z"] * torch.exp(-flow.log_std).numpy()
        expected_log_det = fixture[f"{name}/log_det_per_dim"] - float(flow.log_std.mean())
    found = {
        "z": np.abs(z.numpy() - expected_z.reshape(len(z), -1)).max(),
        "log_det_per_dim": np.abs(log_det.numpy() / flow.num_dims - expected_log_det).max(),
    }
    for key, arguments in case.samplings.items():
        sample = flow.inverse(latents, sample_y, guidance(dict(arguments)))
        found[f"sample_{key}"] = np.abs(sample.numpy() - fixture[f"{name}/sample_{key}"]).max()
    if f"{name}/denoised" in fixture:
        denoised = flow.denoised(given["x"], sample_y, DENOISE_STD)
        found["denoised"] = np.abs(denoised.numpy() - fixture[f"{name}/denoised"]).max()
    return {key: float(value) for key, value in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_public_code_computes(stored: Fixture, name: str) -> None:
    found = differences(stored, name)
    assert max(found.values()) <= TOLERANCE, found


def test_the_comparison_can_fail(stored: Fixture) -> None:
    """Guided samples differ from each other by much more than the tolerance."""
    samples = [stored[f"conditional/sample_{key}"] for key in CASES["conditional"].samplings]
    for i, first in enumerate(samples):
        for second in samples[:i]:
            assert np.abs(first - second).max() > 100 * TOLERANCE
    assert np.abs(stored["unconditional/sample_plain"] - stored["unconditional/sample_guided"]).max() > 100 * TOLERANCE


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_a_checkout_computes(name: str, ml_tarflow: Path, stored: Fixture) -> None:
    live = compute(ml_tarflow)
    found = differences(live, name)
    assert max(found.values()) <= TOLERANCE, found
    assert live.keys() == stored.keys()
    for key in live:
        if live[key].dtype.kind == "f":
            assert np.abs(live[key] - stored[key]).max() <= TOLERANCE, key


def test_every_size_is_inferred(stored: Fixture) -> None:
    found = {name: converted(stored, name) for name in CASES}
    assert {name: flow.event_shape for name, flow in found.items()} == {
        "conditional": (3, 8, 8),
        "unconditional": (1, 12, 12),
        "volume_preserving": (3, 8, 8),
    }
    assert [flow.patch_size for flow in found.values()] == [2, 3, 2]
    assert [flow.num_classes for flow in found.values()] == [3, None, 3]
    assert [len(flow.blocks) for flow in found.values()] == [3, 3, 2]
    assert {flow.config.layers_per_block for flow in found.values() if flow.config} == {(2, 2, 2), (2, 2)}


def test_channels_can_be_given(stored: Fixture) -> None:
    state = as_state_dict(stored, "conditional")  # 12 features: 3 channels of 2x2, or 12 of 1x1
    assert flow_from_ml_tarflow(state, "it", num_channels=12).event_shape == (12, 4, 4)
    with pytest.raises(DataError, match="a token must be a square patch with 5 channels, got 12 features"):
        flow_from_ml_tarflow(state, "it", num_channels=5)


@torch.no_grad()
def test_the_volume_preserving_likelihood_holds_the_scale_that_the_public_loss_leaves_out(stored: Fixture) -> None:
    """Compared with the density written out: z of the public code under N(0, var)."""
    state, case = as_state_dict(stored, "volume_preserving"), CASES["volume_preserving"]
    flow, given = converted(stored, "volume_preserving"), inputs(case)
    z = torch.from_numpy(stored["volume_preserving/z"]).double()
    by_hand = torch.distributions.Normal(0.0, state["var"].double().sqrt()).log_prob(z).sum(dim=(1, 2))
    ours = flow.log_prob(given["x"], given["y"]).double()
    assert (ours - by_hand).abs().max() < 1e-4
    public_loss = standard_normal_log_prob(z.flatten(1))
    assert (ours - public_loss).abs().min() > 1


class Malicious:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def broken(stored: Fixture, **changes: object) -> dict[str, object]:
    state: dict[str, object] = dict(as_state_dict(stored, "conditional"))
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"weights": Malicious()}, r"a.pth cannot be read as plain weights \(Weights only load failed"),
        (lambda s: [torch.ones(2)], r"must hold a dictionary of tensors by name \(got list\)"),
        (lambda s: {"optimizer": {}, "lr_schedule": {"counter": torch.zeros(1)}}, r"not the file of the optimizer"),
        (lambda s: {"a": torch.ones(2)}, r"is not an ml-tarflow model \(no var\)"),
        (lambda s: broken(s, blocks__0__pos_embed=None), r"\(no blocks.0.pos_embed\)"),
        (lambda s: broken(s, blocks__1__attn_blocks__0__mlp__norm__weight=None), r"Missing key.*mlp_norm.weight"),
        (lambda s: broken(s, blocks__0__pos_embed=torch.ones(16, 48)), r"multiple of 64, got 48"),
        (lambda s: broken(s, var=torch.ones(15, 12)), r"number of tokens must be a square, got 15"),
        (lambda s: broken(s, var=torch.ones(16, 12) / 2), r"var of an affine model must be all ones"),
        (lambda s: broken(s, var=torch.ones(16)), r"var must have 2 axes and not be empty, got \(16,\)"),
        (lambda s: broken(s, blocks__0__attn_mask=torch.ones(16, 16)), r"blocks.0.attn_mask must be a causal mask"),
        (
            lambda s: broken(s, blocks__0__proj_out__weight=torch.ones(7, 64)),
            r"proj_out must have 12 or 24 rows, got 7",
        ),
        (lambda s: broken(s, var=torch.ones(0, 12)), r"var must have 2 axes and not be empty, got \(0, 12\)"),
        (
            lambda s: broken(s, blocks__0__class_embed=torch.ones(3, 2, 64)),
            r"must be \(classes, 1, 64\), got \(3, 2, 64\)",
        ),
        (lambda s: broken(s, blocks__1__class_embed=torch.ones(3)), r"blocks.1.class_embed must have 3 axes"),
        (
            lambda s: broken(s, blocks__1__class_embed=torch.ones(2, 1, 64)),
            r"size mismatch for blocks.1.class_embedding",
        ),
        (
            lambda s: broken(s, blocks__0__attn_blocks__1000000__mlp__norm__bias=torch.ones(64)),
            r"layers of block 0 must be numbered from 0 without a gap, got \[0, 1, 1000000\]",
        ),
        (lambda s: broken(s, blocks__0__proj_in__bias=torch.ones(64).int()), r"must be dense floats, got torch.int32"),
        (lambda s: broken(s, blocks__0__attn_mask=torch.ones(3, 3).tril()), r"attn_mask must be a causal mask"),
        (lambda s: broken(s, blocks__0__attn_mask=torch.ones(16)), r"blocks.0.attn_mask must be a causal mask"),
        (lambda s: broken(s, head__weight=torch.ones(2)), r"unknown tensor head.weight"),
        (
            lambda s: broken(s, blocks__2__proj_in__bias=torch.full((64,), float("nan"))),
            r"weights must be finite \(got 64 values of blocks.2.proj_in.bias that are not\)",
        ),
    ],
)
def test_what_is_no_tarflow_is_refused(
    stored: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content(stored), "a.pth")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        load_ml_tarflow("a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_damaged_files_are_refused(stored: Fixture, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with pytest.raises(DataError, match="the file .*a.pth does not exist; check the path of the weights"):
        load_ml_tarflow(str(path))
    torch.save(as_state_dict(stored, "conditional"), path)
    load_ml_tarflow(str(path))
    for content in (path.read_bytes()[:5000], b"", b"no weights at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as plain weights"):
            load_ml_tarflow(str(path))


def test_weights_depend_on_their_name_alone(stored: Fixture) -> None:
    shapes = {"var": (4, 3), "blocks.0.proj_in.weight": (64, 3)}
    first, second = state_dict(shapes, affine=False), state_dict(dict(reversed(shapes.items())), affine=False)
    assert all(torch.equal(first[key], second[key]) for key in shapes)
