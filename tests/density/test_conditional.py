"""Classification, marginals and moves in latent space, compared with their definitions."""

import math

import pytest
import torch

from tarflow_scale.config.model import GlowConfig
from tarflow_scale.density import (
    attribute_direction,
    classify,
    edited,
    interpolated,
    log_prob_of_labels,
    marginal_log_prob,
)
from tarflow_scale.flows import Flow, build
from tarflow_scale.records import PixelFormat
from tests.flows.catalogue import FLOWS


def flow(name: str = "glow_lu_affine_conditional") -> Flow:
    (case,) = (case for case in FLOWS if case.name == name)
    return case.flow()


def images(num: int, made: Flow) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return 0.8 * torch.randn(num, *made.event_shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", ["tarflow_conditional", "maf_conditional", "realnvp_conditional"])
def test_bayes_rule_by_hand(name: str) -> None:
    made = flow(name)
    x = images(4, made)
    of_labels = log_prob_of_labels(made, x)
    labels, posterior = classify(made, x)
    for i in range(4):
        by_hand = [float(made.log_prob(x[i : i + 1], torch.tensor([y])).detach()) for y in range(3)]
        assert of_labels[i].tolist() == pytest.approx(by_hand)
        weights = [math.exp(value - max(by_hand)) for value in by_hand]
        assert posterior[i].tolist() == pytest.approx([weight / sum(weights) for weight in weights])
        assert int(labels[i]) == max(range(3), key=by_hand.__getitem__)
        expected = max(by_hand) + math.log(sum(weights) / 3)
        assert float(marginal_log_prob(made, x)[i].detach()) == pytest.approx(expected)


def test_a_flow_without_classes_has_none_to_tell() -> None:
    made = flow("glow_lu_affine")
    with pytest.raises(ValueError, match="probabilities of labels need a flow with classes"):
        classify(made, images(1, made))


@pytest.mark.parametrize("path", ["arc", "line"])
def test_a_way_begins_and_ends_where_it_should(path: str) -> None:
    made = flow()
    a, b = images(2, made)
    y = torch.tensor([1])
    way = interpolated(made, a, b, 5, y, path)  # type: ignore[arg-type]
    assert (way[0] - a).abs().max() < 1e-8
    assert (way[-1] - b).abs().max() < 1e-8
    z = made(way, y.expand(5))[0].detach()
    lengths = z.norm(dim=1)
    if path == "arc":
        assert torch.allclose(lengths, torch.linspace(float(lengths[0]), float(lengths[-1]), 5, dtype=torch.float64))
    else:
        assert torch.allclose(z[2], (z[0] + z[4]) / 2)
        assert lengths[2] < min(lengths[0], lengths[-1])
    same = interpolated(made, a, a, 3, y, path)  # type: ignore[arg-type]
    assert (same - a).abs().max() < 1e-8


def test_an_attribute_moves_latents_by_the_difference_of_means() -> None:
    made = flow()
    x = images(9, made)
    direction = attribute_direction(made, x[:4], x[4:8])
    expected = made(x[:4])[0].mean(dim=0) - made(x[4:8])[0].mean(dim=0)
    assert torch.allclose(direction, expected.detach())
    assert (edited(made, x[8:], direction, 0.0) - x[8:]).abs().max() < 1e-8
    moved = edited(made, x[8:], direction, 0.3)
    assert torch.allclose(made(moved)[0] - made(x[8:])[0], 0.3 * direction)


def test_moves_of_images_on_another_scale_are_refused_and_labels_may_be_names() -> None:
    made = flow()
    made.pixels = PixelFormat(bit_depth=8, noise="uniform")
    made.class_names = ("daisies", "roses", "tulips")
    x = images(2, made)
    stored = 255 * torch.rand(2, *made.event_shape, dtype=torch.float64)
    direction = torch.ones(made.num_dims, dtype=torch.float64)
    for move in (
        lambda of: interpolated(made, of[0], of[1], 3),
        lambda of: edited(made, of, direction, 0.5),
        lambda of: attribute_direction(made, of, x),
    ):
        move(x)
        with pytest.raises(ValueError, match=r"images must be on \[-1, 1\]"):
            move(stored)
    y = torch.tensor([1, 1])
    assert torch.equal(edited(made, x, direction, 0.5, "roses"), edited(made, x, direction, 0.5, y))
    assert torch.equal(interpolated(made, x[0], x[1], 3, "roses"), interpolated(made, x[0], x[1], 3, y[:1]))


def test_interpolation_takes_one_condition_of_numbers() -> None:
    torch.manual_seed(0)
    made = build(GlowConfig(levels=1, steps_per_level=2, width=8), (1, 4, 4), None, num_conditions=2).double().eval()
    x = images(2, made)
    made.train().initialize(x, torch.zeros(2, 2, dtype=torch.float64))
    made.eval()
    given = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    between = interpolated(made, x[0], x[1], 3, given)
    assert torch.allclose(between[[0, 2]], x, atol=1e-8)
