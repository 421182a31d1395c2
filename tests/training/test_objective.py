"""The objective of flows: the likelihood, and the norm of the tokens between blocks."""

import math

import pytest
import torch

from tarflow_scale.flows import TarFlow
from tarflow_scale.flows.tarflow import patchify
from tarflow_scale.records import PixelFormat
from tarflow_scale.training.objective import FlowObjective
from tests.flows.catalogue import FLOWS


@pytest.mark.parametrize("activations", ["keep", "checkpoint"])
def test_the_norm_of_tokens_between_blocks_joins_the_loss_but_not_the_log(activations: str) -> None:
    (case,) = (case for case in FLOWS if case.name == "tarflow_deep_shallow")
    flow, (x, y) = case.flow(), case.data(4)
    assert isinstance(flow, TarFlow)
    assert len(flow.blocks) == 3
    flow.activations, flow.pixels = activations, PixelFormat(bit_depth=8, noise="uniform")  # type: ignore[assignment]
    plain = FlowObjective(flow, conditional=True, label_drop=0.0)(x, y)[:, 0]
    tokens, squares = patchify(x, flow.patch_size), torch.zeros(len(x), dtype=torch.float64)
    for block in flow.blocks[:-1]:
        tokens, _ = block(tokens, y)
        squares = squares + tokens.square().mean(dim=(1, 2))
    objective = FlowObjective(flow, conditional=True, label_drop=0.0, latent_norm_weight=0.3)
    for _ in range(2):  # a second pass does not add to the first
        figures = objective(x, y)
        assert (figures[:, 1] - plain).abs().max() < 1e-10
        assert (figures[:, 0] - plain - 0.3 * flow.num_dims * squares).abs().max() < 1e-10
    expected = torch.autograd.grad((plain + 0.3 * flow.num_dims * squares).sum(), list(flow.parameters()))
    found = torch.autograd.grad(figures[:, 0].sum(), list(flow.parameters()))
    assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) < 1e-8
    nats = float(plain.mean())
    record = objective.record((9.0, nats))
    assert record["nats_per_dim"] == pytest.approx(nats / flow.num_dims)
    assert objective.text((9.0, nats)) == f"{nats / flow.num_dims / math.log(2) + 7:.3f} bits/dim"
