"""Uses of a class-conditional likelihood: classification, marginal likelihood, and edits in latent space.

With p(y) uniform over K classes,

    log p(x) = log sum_y p(x | y) - log K,        p(y | x) = p(x | y) / sum_y' p(x | y')

Images are interpolated along a line or an arc between their latents (Kingma and Dhariwal, arXiv 1807.03039, section 5);
the direction of an attribute is the mean latent of images with it, minus the mean latent of images without it.

Shapes: B images, K classes, D dimensions. Densities: nats.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflow_scale.flows import Flow
from tarflow_scale.flows.conditions import GivenCondition

__all__ = ["attribute_direction", "classify", "edited", "interpolated", "log_prob_of_labels", "marginal_log_prob"]


def log_prob_of_labels(flow: Flow, x: Tensor) -> Float[Tensor, "B K"]:
    """Compute log p(x | y) in nats for every label with `Flow.log_prob_of_images`.

    If the flow has a dequantizer, the result is a lower bound; its term log q is the same for all labels.

    Raises:
        ValueError: the flow has no classes, or the images do not fit it.
    """
    if flow.num_classes is None:
        raise ValueError(
            "probabilities of labels need a flow with classes (got num_classes=None); train one with "
            "model.class_conditional=true"
        )
    labels = range(flow.num_classes)
    return torch.stack([flow.log_prob_of_images(x, x.new_full((len(x),), y, dtype=torch.int64)) for y in labels], dim=1)


def marginal_log_prob(flow: Flow, x: Tensor) -> Float[Tensor, " B"]:
    """Log p(x) in nats, with all labels equally likely.

    Raises:
        ValueError: see `log_prob_of_labels`.
    """
    log_probs = log_prob_of_labels(flow, x)
    return torch.logsumexp(log_probs, dim=1) - math.log(log_probs.shape[1])


@torch.no_grad()
def classify(flow: Flow, x: Tensor) -> tuple[Int[Tensor, " B"], Float[Tensor, "B K"]]:
    """The most likely label of each image, and p(y | x) for every label, by Bayes' rule.

    Raises:
        ValueError: see `log_prob_of_labels`.
    """
    posterior = torch.softmax(log_prob_of_labels(flow, x), dim=1)
    return posterior.argmax(dim=1), posterior


@torch.no_grad()
def interpolated(
    flow: Flow,
    start: Tensor,
    end: Tensor,
    num: int,
    y: GivenCondition = None,
    path: Literal["arc", "line"] = "arc",
) -> Tensor:
    """Interpolate between two images. Returns images ``(num, *event)``, both ends included.

    Args:
        flow: encodes and decodes the images.
        start: the first image ``(*event)``.
        end: the last image ``(*event)``.
        num: number of images, at least 2.
        y: one label for all images: a tensor ``(1,)``, a class number or name, or None, which drops the label; or
            conditions ``(1, K)`` of a flow that takes numbers.
        path: ``line`` is the straight line between the latents. ``arc`` rotates one latent into the other and
            interpolates their lengths, so that images between the ends are as typical as the ends.

    Raises:
        ValueError: ``num`` or ``path`` is invalid, or the images or the label do not fit the flow.
    """
    if num < 2 or path not in ("arc", "line"):
        raise ValueError(f"path must be arc or line, and num at least 2 (got {path!r} and {num}); correct it")
    ends = torch.stack([start, end])
    a, b = flow(ends, flow.check_data(ends, _of_all(y, 2)))[0]
    share = torch.linspace(0, 1, num, dtype=a.dtype, device=a.device)[:, None]
    if path == "line":
        z = (1 - share) * a + share * b
    else:
        cosine = torch.dot(a, b) / (a.norm() * b.norm())
        angle = torch.arccos(cosine.clamp(-1, 1))
        if float(angle) < 1e-4:  # the latents are parallel, so an arc is a line
            direction = ((1 - share) * a + share * b) / a.norm()
        else:
            parts = torch.sin((1 - share) * angle) * a / a.norm() + torch.sin(share * angle) * b / b.norm()
            direction = parts / torch.sin(angle)
        z = direction * ((1 - share) * a.norm() + share * b.norm())
    return flow.inverse(z, _of_all(y, num))


@torch.no_grad()
def attribute_direction(
    flow: Flow, with_it: Tensor, without_it: Tensor, y_with: GivenCondition = None, y_without: GivenCondition = None
) -> Float[Tensor, " D"]:
    """Mean latent of images ``(B, *event)`` with an attribute, minus the mean latent of images without it."""
    with_mean = flow(with_it, flow.check_data(with_it, y_with))[0].mean(dim=0)
    return with_mean - flow(without_it, flow.check_data(without_it, y_without))[0].mean(dim=0)


@torch.no_grad()
def edited(flow: Flow, x: Tensor, direction: Float[Tensor, " D"], strength: float, y: GivenCondition = None) -> Tensor:
    """Move images by ``strength * direction`` in latent space; strength 0 returns the same images."""
    labels = flow.check_data(x, y)
    return flow.inverse(flow(x, labels)[0] + strength * direction, labels)


def _of_all(y: GivenCondition, num: int) -> GivenCondition:
    return y.expand(num, *y.shape[1:]) if torch.is_tensor(y) else y
