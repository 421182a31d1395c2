"""Random numbers for a decoded training sample: its noise, and whether its label is dropped.

Both are functions of (seed, epoch, sample). Noise is drawn on the device; copying float noise there would take four
times as many bytes as copying the uint8 images. The generator is Philox 4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) in torch's integer arithmetic, which gives the same 32-bit words on every device.
Torch's own generators differ between devices, and cannot draw the noise of a single sample.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from tarflow_scale.flows.likelihood import add_noise
from tarflow_scale.randomness import Purpose, generator
from tarflow_scale.records import LatentFacts, PixelFormat
from tarflow_scale.shards.reader import Batch

__all__ = ["Philox", "conditions", "dropped_labels", "model_input", "sample_noise"]

_MASK = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class Philox:
    """Philox 4x32-10 with a key of two 32-bit words."""

    key: tuple[int, int]

    def words(self, counters: Sequence[Int64[Tensor, "..."]]) -> tuple[Int64[Tensor, "..."], ...]:
        """Four random words in ``[0, 2^32)`` for each counter.

        A counter has four words: tensor i of ``counters`` contains word i of every counter. The tensors may broadcast.
        """
        c0, c1, c2, c3 = counters
        k0, k1 = self.key
        for _ in range(_ROUNDS):
            # Products wrap at 2^64; shifts of negative numbers fill with ones, which the mask removes.
            first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
            c0, c1 = (second >> 32 & _MASK) ^ c1 ^ k0, second & _MASK
            c2, c3 = (first >> 32 & _MASK) ^ c3 ^ k1, first & _MASK
            k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
        return c0, c1, c2, c3


def model_input(batch: Batch, pixels: PixelFormat, seed: int, device: torch.device) -> Float[Tensor, "B ..."]:
    """Copy a batch to the device. If the pixel format has noise, add the noise and convert pixels to floats."""
    events = torch.from_numpy(batch.events).to(device, non_blocking=True).contiguous()
    if pixels.noise == "none":
        return events
    if batch.latents is not None:
        events = _latents(events, batch.latents, batch, seed)
    noise = sample_noise(pixels.noise, seed, batch.epochs, batch.samples, events.shape[1:].numel(), device)
    noise = noise.view(events.shape)
    return add_noise(events, noise, pixels) if batch.latents is None else events + pixels.noise_std * noise


def _latents(
    moments: Float[Tensor, "B M H W"], latents: LatentFacts, batch: Batch, seed: int
) -> Float[Tensor, "B C H W"]:
    """Draws from the Gaussians of latents, standardised by the mean and scale of each channel."""
    mean, scale = (
        torch.tensor(values, device=moments.device)[:, None, None] for values in (latents.mean, latents.scale)
    )
    z = moments
    if latents.has_variance:
        centre, log_var = moments.chunk(2, dim=1)
        num_dims = centre.shape[1:].numel()
        drawn = sample_noise("gaussian", seed, batch.epochs, batch.samples, num_dims, moments.device, Purpose.LATENT)
        z = centre + torch.exp(0.5 * log_var) * drawn.view(centre.shape)
    return (z - mean) / scale


def sample_noise(
    kind: Literal["uniform", "gaussian"],
    seed: int,
    epochs: NDArray[np.int64],
    samples: NDArray[np.int64],
    num_dims: int,
    device: torch.device,
    purpose: Purpose = Purpose.NOISE,
) -> Float[Tensor, "B D"]:
    """Float32 noise of samples ``(B,)``: uniform on [0, 1) or standard normal.

    Uniform noise is the same on every device; normal noise can differ by rounding of its logarithm, sine and cosine.

    Args:
        kind: the distribution.
        seed: seed in [0, 2^64).
        epochs: epoch of each sample, below 2^32.
        samples: number of each sample, below 2^56.
        num_dims: number of random numbers for each sample.
        device: device of the result.
        purpose: streams of different purposes differ.
    """
    where = torch.from_numpy(np.stack([epochs, samples])).to(device)[:, :, None]
    epoch, low, high = where[0], where[1] & _MASK, (where[1] >> 32) | (int(purpose) << 24)
    blocks = torch.arange(-(-num_dims // 4), device=device)
    words = Philox((seed & _MASK, seed >> 32)).words((blocks, epoch, low, high))
    if kind == "uniform":
        noise = [(word >> 8).float() * 2.0**-24 for word in words]
    else:
        noise = [number for pair in (words[:2], words[2:]) for number in _normal(*pair)]
    return torch.stack(noise, dim=-1).flatten(1)[:, :num_dims]


def _normal(first: Int64[Tensor, "..."], second: Int64[Tensor, "..."]) -> tuple[Float[Tensor, "..."], ...]:
    """Two standard normal numbers from two words (Box and Muller, 1958); their magnitude is at most 6.8."""
    radius = torch.sqrt(-2 * torch.log((first.float() + 0.5) * 2.0**-32))
    angle = (second >> 8).float() * (2 * math.pi * 2.0**-24)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def conditions(batch: Batch, label_drop: float, seed: int, device: torch.device) -> Tensor:
    """The stored conditions ``(B, K)`` of a batch; if it has none, its labels ``(B,)`` with -1 for dropped labels."""
    if batch.conditions is not None:
        return torch.from_numpy(batch.conditions).to(device)
    return dropped_labels(batch, label_drop, seed).to(device)


def dropped_labels(batch: Batch, probability: float, seed: int) -> Int64[Tensor, " B"]:
    """Labels of a batch, with -1 in place of each dropped label."""
    draws = [
        generator(Purpose.LABEL_DROP, seed, int(epoch), int(sample)).random()
        for epoch, sample in zip(batch.epochs, batch.samples, strict=True)
    ]
    return torch.from_numpy(np.where(np.array(draws) < probability, -1, batch.labels))
