"""Inputs and baselines of likelihood protocols. Dequantization noise depends only on (protocol seed, sample, draw)."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.config.protocols import BitsPerDimProtocol
from tarflow_scale.flows.likelihood import bits_per_dim, combine_draws, dequantized
from tarflow_scale.metrics.baseline import MAX_DIMS, PixelGaussian
from tarflow_scale.records import canonical_json
from tarflow_scale.shards.reader import Batch, ShardSet

__all__ = ["dequantized_draws", "gaussian_bits_per_dim", "gaussian_nats", "sample_hashes"]

_BATCH = 256
_LEAST_EIGENVALUE = 1e-7
"""Smallest accepted eigenvalue of a correlation matrix; below it, float32 columns count as linearly dependent."""


def dequantized_draws(batch: Batch, protocol: BitsPerDimProtocol) -> list[Tensor]:
    """Dequantized images: one float tensor ``(B, C, H, W)`` in [-1, 1] for each draw of the protocol."""
    images = torch.from_numpy(batch.events)
    return [
        dequantized(images, protocol.bit_depth, protocol.seed, batch.samples.tolist(), draw)
        for draw in range(protocol.num_draws)
    ]


def sample_hashes(batch: Batch) -> tuple[str, ...]:
    """SHA-256 of each sample, computed over its stored values, and then over what else determines its likelihood.

    These are the condition values of vectors, and the mean and scale that standardise latents.
    """
    given = [b""] * len(batch) if batch.conditions is None else [row.tobytes() for row in batch.conditions]
    if batch.latents is not None:
        given = [canonical_json([batch.latents.mean, batch.latents.scale])] * len(batch)
    pairs = zip(batch.events, given, strict=True)
    return tuple(hashlib.sha256(event.tobytes() + condition).hexdigest() for event, condition in pairs)


def gaussian_bits_per_dim(gaussian: PixelGaussian, protocol: BitsPerDimProtocol, shards: ShardSet) -> float:
    """Mean bits/dim of a pixel Gaussian on the images of ``shards``, dequantized as the protocol defines."""
    total, count = 0.0, 0
    for batch in shards.batches(0, shards.manifest.num_images, _BATCH):
        draws = torch.stack([gaussian.log_prob(x) for x in dequantized_draws(batch, protocol)])
        log_prob = combine_draws(draws, protocol.estimate)
        total += float(bits_per_dim(log_prob, math.prod(shards.manifest.event.shape), protocol.bit_depth).sum())
        count += len(log_prob)
    return total / count


def gaussian_nats(reference: ShardSet, test: ShardSet) -> float | None:
    """Mean negative log-likelihood per test vector, in nats, of a full-covariance Gaussian fitted to the reference.

    None if the covariance is singular, or if vectors have more than ``MAX_DIMS`` dimensions.
    """
    train, held_out = (
        np.concatenate([batch.events for batch in shards.batches(0, shards.manifest.num_images, _BATCH)]).astype(float)
        for shards in (reference, test)
    )
    num, dims = train.shape
    mean, std = train.mean(axis=0), train.std(axis=0)
    if num <= dims or dims > MAX_DIMS or not (std > 0).all():
        return None
    train, held_out = (train - mean) / std, (held_out - mean) / std  # the test for singularity must not depend on units
    values, vectors = np.linalg.eigh(train.T @ train / (num - 1))
    if values.min() < _LEAST_EIGENVALUE:
        return None  # columns are linearly dependent
    distances = np.square(held_out @ vectors / np.sqrt(values)).sum(axis=1)
    log_det = np.log(values).sum() + 2 * np.log(std).sum()
    return float(0.5 * (distances.mean() + log_det + dims * math.log(2 * math.pi)))
