"""Bound on the likelihood of images under a flow on the latents of an autoencoder.

The model draws a standardised latent v from the flow, and the levels of pixels x from p(x | v), the distribution of the
decoder at the latent mean + scale v of each channel. Its likelihood is an integral over v. For any density q(v | x),

    log p(x) = log E_q[w] >= E_q[log w],        w = p(x | v) p_flow(v) / q(v | x)

(Kingma and Welling, arXiv 1312.6114). With K draws, the mean of log w estimates this bound; log mean_k w_k is, on
average, a tighter bound, which converges to log p(x) (Burda et al., arXiv 1509.00519).

q is the distribution of the latents that the flow was trained on: a draw from the encoder's Gaussian with mean m and
deviation s, standardised, plus the training noise. As a sum of independent Gaussians, it has in each dimension the
density

    q(v | x) = N((m - mean) / scale, (s / scale)^2 + noise_std^2)

The bound stays valid because the noise is a part of q, whose density includes it. -E_q[log p_flow(v)] is then the loss
of the flow, and -E_q[log p(x | v)] the loss of a decoder that is trained on latents with the same noise. Samples that
are denoised before they are decoded (``sampling.denoise``) belong to another model, whose likelihood this is not.

p_flow and q are both densities of v. As densities of mean + scale v, both have the factor 1 / prod(scale) more, which
cancels. p(x | v) is a probability of levels, so the bound has no term for dequantization.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tarflow_scale.autoencoders.rendering import Renderer
from tarflow_scale.config.protocols import BoundProtocol
from tarflow_scale.flows import Flow
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.flows.latents import latents
from tarflow_scale.flows.likelihood import combine_draws, to_levels
from tarflow_scale.randomness import Purpose
from tarflow_scale.shards.reader import Batch

__all__ = ["bits_per_dim_bound", "log_weights"]


def bits_per_dim_bound(flow: Flow, batch: Batch, y: Condition, protocol: BoundProtocol) -> Float[Tensor, " B"]:
    """The bound of each image in bits per dimension of pixels, in float64.

    Args:
        flow: a flow on latents with a `Renderer`.
        batch: images.
        y: labels, or None.
        protocol: number, seed and combination of the draws.

    Raises:
        ValueError: the autoencoder gives levels of pixels no probability, or its latents have no density.
    """
    bound = combine_draws(log_weights(flow, batch, y, protocol), protocol.estimate)
    return -bound / (math.prod(flow.shown_shape) * math.log(2))


@torch.no_grad()
def log_weights(flow: Flow, batch: Batch, y: Condition, protocol: BoundProtocol) -> Float[Tensor, "K B"]:
    """Log w of each draw and image in nats, in float64; draw k of an image depends on (seed, sample, k) alone.

    The networks run in the precision of their weights. Arguments and errors: see `bits_per_dim_bound`.
    """
    assert isinstance(flow.renderer, Renderer)
    assert flow.pixels is not None
    weight = next(flow.parameters())
    images = torch.from_numpy(batch.events).to(weight.device)
    levels = to_levels(images, protocol.bit_depth)
    posterior = flow.renderer.posterior(images, flow.pixels.noise_std)
    weights: list[Tensor] = []
    for draw in range(protocol.num_draws):
        samples = batch.samples.tolist()
        noise = latents(protocol.seed, samples, flow.num_dims, draw, Purpose.BITS_PER_DIM_NOISE)
        v = posterior.at(noise.view(-1, *flow.event_shape).to(posterior.mean)).to(weight.dtype)
        log_p = flow.renderer.log_prob_of_levels(levels, protocol.bit_depth, v) + flow.log_prob(v, y).double()
        weights.append(log_p - posterior.log_prob(v.double()))  # of v as the networks see it, after rounding
    return torch.stack(weights)
