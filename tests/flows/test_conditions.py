"""Conditions: labels and vectors of numbers are equivalent, and conditions that do not fit are refused."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from tarflow_scale.config.model import MAFConfig, TarFlowConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import Flow, build, load_flow, save_flow
from tarflow_scale.flows.conditions import embed
from tests.flows.catalogue import FLOWS, NUM_CLASSES, FlowCase, moved

CONDITIONAL = [case for case in FLOWS if case.config.class_conditional]


def given_numbers(case: FlowCase) -> Flow:
    """The flow of a case with the same weights, conditioned on as many numbers as it has classes."""
    flow = build(case.config, case.event_shape, None, NUM_CLASSES).double()
    flow.load_state_dict(case.flow().state_dict())
    return flow.eval()


@pytest.mark.parametrize("case", CONDITIONAL, ids=lambda case: case.name)
def test_a_label_is_a_vector_with_a_single_one(case: FlowCase) -> None:
    x, _ = case.data(3)
    labels = torch.tensor([2, 0, 1])
    expected_z, expected_log_det = case.flow()(x, labels)
    z, log_det = given_numbers(case)(x, torch.eye(NUM_CLASSES, dtype=torch.float64)[labels])
    assert torch.allclose(z, expected_z, atol=1e-12)
    assert torch.allclose(log_det, expected_log_det, atol=1e-12)


@pytest.mark.parametrize("case", CONDITIONAL, ids=lambda case: case.name)
def test_given_numbers_it_is_a_flow(case: FlowCase) -> None:
    flow = given_numbers(case)
    x, _ = case.data(2)
    y = torch.randn(2, NUM_CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    z, log_det = flow(x, y)
    assert float((flow.inverse(z, y) - x).detach().abs().max()) <= case.inverse
    for row in range(2):

        def one(value: Tensor, row: int = row) -> Tensor:
            return flow(value[None], y[row : row + 1])[0][0]

        jacobian = torch.autograd.functional.jacobian(one, x[row]).reshape(flow.num_dims, flow.num_dims)
        assert abs(float(torch.linalg.slogdet(jacobian)[1] - log_det[row].detach())) <= case.log_det
    assert not torch.allclose(flow(x, y + 0.3)[0], z)


def test_saved_and_loaded_it_takes_the_same_numbers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    flow = build(MAFConfig(transforms=2, hidden_widths=(16,)), (3,), None, 2).eval()
    moved(flow, ())
    save_flow(flow, str(tmp_path))
    again = load_flow(str(tmp_path))
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    assert (again.num_classes, again.num_conditions) == (None, 2)
    assert torch.equal(again.log_prob(x, y), flow.log_prob(x, y))
    assert flow.sample(5, torch.zeros(5, 2)).shape == (5, 3)


def test_what_does_not_fit_is_said() -> None:
    flow = build(MAFConfig(transforms=1, hidden_widths=(8,)), (3,), None, 2)
    x = torch.randn(4, 3)
    for y in (None, torch.zeros(4, 3), torch.zeros(3, 2), torch.zeros(4)):
        with pytest.raises(ValueError, match=re.escape("conditions must have shape (4, 2)")):
            flow.log_prob(x, y)
    with pytest.raises(ValueError, match="finite floats"):
        flow.log_prob(x, torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match="finite floats"):
        flow.log_prob(x, torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="on labels or on numbers, not on both"):
        build(MAFConfig(), (3,), 2, 2)
    with pytest.raises(ConfigError, match="with classes"):
        build(MAFConfig(), (3,))


def test_numbers_are_not_rounded_to_bf16() -> None:
    table, years = torch.tensor([[0.5, -0.25]]), torch.tensor([[2021.0], [2022.0], [2023.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed(table, years), years * table)


def test_guidance_needs_labels_to_drop() -> None:
    sizes = {"patch_size": 2, "width": 16, "head_width": 8, "layers_per_block": (1,)}
    flow = build(TarFlowConfig.model_validate({"kind": "tarflow", **sizes}), (1, 4, 4), None, 2)
    with pytest.raises(ValueError, match="flow without classes"):
        flow.sample(2, torch.zeros(2, 2), guidance=0.5)


def test_labels_by_number_name_or_list() -> None:
    flow = build(TarFlowConfig(patch_size=2, width=16, head_width=8, layers_per_block=(1,)), (1, 4, 4), 3).eval()
    moved(flow, ("proj_out",))
    flow.class_names = ("daisies", "roses", "tulips")
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([2, 2, 2, 2])
    assert torch.equal(flow.log_prob(x, 2), flow.log_prob(x, y))
    assert torch.equal(flow.log_prob(x, "tulips"), flow.log_prob(x, y))
    assert not torch.equal(flow.log_prob(x, 1), flow.log_prob(x, y))
    assert torch.equal(flow(x, 2)[0], flow(x, y)[0])
    assert torch.equal(flow.inverse(x.flatten(1), 2), flow.inverse(x.flatten(1), y))
    assert torch.equal(flow.nats_of_values(x, "tulips"), flow.nats_of_values(x, y))
    mixed = torch.tensor([1, 0])
    assert torch.equal(flow.sample(2, y=["roses", "daisies"], seed=0), flow.sample(2, mixed, seed=0))
    assert torch.equal(flow.sample(2, y=[1, "daisies"], seed=0), flow.sample(2, mixed, seed=0))
    assert torch.equal(flow.sample(2, y="roses", seed=0), flow.sample(2, 1, seed=0))


def test_labels_that_are_no_classes_are_one_line() -> None:
    flow = build(TarFlowConfig(patch_size=2, width=16, head_width=8, layers_per_block=(1,)), (1, 4, 4), 3).eval()
    with pytest.raises(ValueError, match=r"^labels must be numbers if the names of classes are not known \(got"):
        flow.sample(2, y="roses")
    flow.class_names = ("daisies", "roses", "tulips")
    with pytest.raises(
        ValueError,
        match=r"^labels must be class names or numbers \(got rose, did you mean roses\?\); the names are daisies",
    ):
        flow.sample(2, y="rose")
    with pytest.raises(
        ValueError, match=r"^labels must be class names or numbers \(got cars\); the names are daisies, roses, tulips$"
    ):
        flow.log_prob(torch.zeros(2, 1, 4, 4), ["roses", "cars"])
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\) \(got \(2,\)\)"):
        flow.sample(3, y=["roses", "tulips"])
    with pytest.raises(ValueError, match=r"in \[0, 3\) or -1 for dropped \(got 3\)"):
        flow.log_prob(torch.zeros(2, 1, 4, 4), 3)


@pytest.mark.parametrize("case", CONDITIONAL, ids=lambda case: case.name)
def test_labels_of_any_integers_are_labels(case: FlowCase) -> None:
    """A uint8 label would index as a mask, and results would be wrong if there are as many images as classes."""
    flow, (x, _) = case.flow(), case.data(NUM_CLASSES)
    expected, drawn = flow.log_prob(x, 1), flow.sample(NUM_CLASSES, 1, seed=0)
    integers = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool]
    for labels in (
        *(torch.ones(NUM_CLASSES, dtype=dtype) for dtype in integers),
        np.ones(NUM_CLASSES, np.uint8),
        np.array(["b"] * NUM_CLASSES),
    ):
        flow.class_names = ("a", "b", "c")
        assert torch.equal(flow.log_prob(x, labels), expected)
        assert torch.equal(flow(x, labels)[1], flow(x, 1)[1])
        assert torch.equal(flow.sample(NUM_CLASSES, labels, seed=0), drawn)
