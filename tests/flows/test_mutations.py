"""The conformance suite detects every kind of wrong log-determinant."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tarflow_scale.flows import Flow
from tarflow_scale.flows.coupling import ActNorm, Coupling, InvertibleConv, Layer
from tarflow_scale.flows.multiscale import Level
from tarflow_scale.flows.realnvp import BatchNorm, MaskedCoupling
from tarflow_scale.flows.tarflow import TarFlowBlock
from tests.flows import conformance
from tests.flows.catalogue import FLOWS, LAYERS, FlowCase, LayerCase, feature_maps, moment_matched

MUTATIONS = {"sign": -1.0, "doubled": 2.0, "dropped": 0.0, "mean instead of sum": 1 / 6}


def scaled(right: Callable, factor: float, place: int) -> Callable:
    """The method, with entry ``place`` of its result multiplied."""

    def wrong(*arguments: object) -> tuple:
        found = list(right(*arguments))
        found[place] = found[place] * factor
        return tuple(found)

    return wrong


def flow_checks(case: FlowCase) -> dict[str, Callable[[Flow], None]]:
    z = torch.randn(1, case.flow().num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return {
        "log_det": lambda flow: conformance.check_flow_log_det(flow, *case.data(1)),
        "density of samples": lambda flow: conformance.check_sample_density(flow, z, case.data(1)[1]),
        "integral": lambda flow: conformance.check_density_integrates_to_one(case.dense()),
    }


CASES = [
    case
    for case in FLOWS
    if case.name
    in ("tarflow_conditional", "tarflow_starflow", "tarflow_volume_preserving", "glow_lu_affine", "realnvp_conditional")
    or case.name in ("nice_conditional", "maf_logit", "iaf_conditional")
]


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_log_determinant_of_a_flow_fails_every_check(
    case: FlowCase, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = flow_checks(case)
    kind = type(case.flow())
    monkeypatch.setattr(kind, "encode", scaled(kind.encode, MUTATIONS[mutation], place=1))
    unnoticed = [name for name, check in checks.items() if not fails(check, case.flow())]
    assert unnoticed == []


def fails(check: Callable[[Flow], None], flow: Flow) -> bool:
    try:
        check(flow)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize(
    ("kind", "method", "place", "name"),
    [
        (TarFlowBlock, "forward", 1, "tarflow_conditional"),
        (TarFlowBlock, "forward", 1, "tarflow_starflow"),
        (TarFlowBlock, "forward", 1, "tarflow_gemma"),
        (ActNorm, "_map", 1, "glow_lu_affine"),
        (InvertibleConv, "_map", 1, "glow_dense_additive"),
        (InvertibleConv, "_map", 1, "glow_lu_additive"),
        (Coupling, "_map", 1, "glow_dense_affine"),
        (Level, "take_latents", 2, "glow_lu_additive"),
        (MaskedCoupling, "_map", 1, "realnvp_conditional"),
        (BatchNorm, "_map", 1, "realnvp_batch"),
    ],
)
def test_a_wrong_log_determinant_of_one_part_is_caught(
    kind: type, method: str, place: int, name: str, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = (case for case in FLOWS if case.name == name)
    flow, data = case.flow(), case.data(1)
    monkeypatch.setattr(kind, method, scaled(getattr(kind, method), MUTATIONS[mutation], place))
    with pytest.raises(AssertionError):
        conformance.check_flow_log_det(flow, *data)


WITH_VOLUME = [case for case in LAYERS if case.name != "coupling_additive"]
"""Layers whose log-determinant is not 0, which no factor changes."""


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("case", WITH_VOLUME, ids=lambda case: case.name)
def test_a_wrong_log_determinant_of_a_layer_is_caught(
    case: LayerCase, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = case.layer(4), feature_maps(1, 4)
    monkeypatch.setattr(type(layer), "_map", scaled(type(layer)._map, MUTATIONS[mutation], place=1))
    with pytest.raises(AssertionError):
        conformance.check_layer_log_det(layer, x)


@pytest.mark.parametrize("dense_or_lu", ["conv_dense", "conv_lu", "actnorm"])
def test_a_forgotten_number_of_pixels_is_caught(dense_or_lu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``log|det W|`` instead of ``H W log|det W|``: correct for one pixel, wrong for six."""
    (case,) = (case for case in LAYERS if case.name == dense_or_lu)
    layer = case.layer(4)
    right = type(layer)._map

    def wrong(self: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = right(self, x)
        return y, log_det / (x.shape[2] * x.shape[3])

    monkeypatch.setattr(type(layer), "_map", wrong)
    conformance.check_layer_log_det(layer, feature_maps(1, 4, height=1, width=1))
    with pytest.raises(AssertionError):
        conformance.check_layer_log_det(layer, feature_maps(1, 4))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_inverse_is_caught(case: FlowCase, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(case.flow())
    right = kind.decode
    monkeypatch.setattr(kind, "decode", lambda self, *arguments: right(self, *arguments) * (1 + 1e-8))
    with pytest.raises(AssertionError):
        conformance.check_flow_inverse(case.flow(), *case.data(2))


def test_a_batch_that_mixes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in FLOWS if case.name == "glow_lu_affine")
    right = ActNorm._map

    def batch_norm(self: ActNorm, x: Tensor) -> tuple[Tensor, Tensor]:
        return right(self, x - 1e-6 * x.mean(dim=0))

    monkeypatch.setattr(ActNorm, "_map", batch_norm)
    with pytest.raises(AssertionError):
        conformance.check_samples_are_independent(case.flow(), *case.data(3))


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", ["tarflow", "glow"])
def test_a_wrong_log_determinant_misses_the_closed_form_of_bits_per_dim(
    name: str, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = moment_matched(name)
    conformance.check_uniform_pixels_cost(flow, conformance.MOMENT_MATCHED)
    monkeypatch.setattr(type(flow), "encode", scaled(type(flow).encode, MUTATIONS[mutation], place=1))
    with pytest.raises(AssertionError):
        conformance.check_uniform_pixels_cost(flow, conformance.MOMENT_MATCHED)
