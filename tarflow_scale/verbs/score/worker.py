"""The worker of ``score``: compute bits/dim of a range of images under one or two flows and lossless codecs.

A part is written completely or not at all. Every worker that makes a part gets the same numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tarflow_scale.config.protocols import BitsPerDimProtocol
from tarflow_scale.config.score import ScoringConfig
from tarflow_scale.density.anomaly import codecs, compressed_bits_per_dim
from tarflow_scale.density.conditional import marginal_log_prob
from tarflow_scale.errors import ConfigError, NumericsError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.likelihood import bits_per_dim, combine_draws
from tarflow_scale.loading import load_version, worker_device
from tarflow_scale.metrics.bits import dequantized_draws
from tarflow_scale.metrics.parts import PartUnit
from tarflow_scale.shards.reader import ShardSet

__all__ = ["Rater", "ScoringUnit", "scoring_protocol"]


@dataclass(frozen=True)
class ScoringUnit(PartUnit):
    """A part to make: bits/dim of a range of images from the data set at ``path``."""

    path: str


def scoring_protocol(bit_depth: int, settings: ScoringConfig) -> BitsPerDimProtocol:
    """The protocol for scoring, which says how images are dequantized."""
    return BitsPerDimProtocol(
        name="score",
        metric="bits_per_dim",
        bit_depth=bit_depth,
        num_draws=settings.num_draws,
        estimate="importance",
        seed=settings.seed,
        labels="none",
    )


class Rater:
    """Holds the flows; scores one part at a time.

    Args:
        versions: ``(registry, model, version)`` of the flow, and of the background model if there is one.
        settings: the section ``scoring``.
        codec_names: names of the lossless codecs that every worker must have.
        threads: number of torch threads.
        gpu: whether this worker was given a GPU.
    """

    def __init__(
        self,
        versions: list[tuple[str, str, int]],
        settings: ScoringConfig,
        codec_names: tuple[str, ...],
        threads: int,
        gpu: bool,
    ) -> None:
        torch.set_num_threads(threads)
        if tuple(sorted(codecs())) != codec_names:
            raise ConfigError(
                f"all workers must have the lossless codecs {', '.join(codec_names)} (got a worker with "
                f"{', '.join(sorted(codecs()))}); install the same version of Pillow on all machines"
            )
        self._device = worker_device(gpu)
        self._flows = [load_version(*version).to(self._device) for version in versions]
        self._settings = settings
        self._sets: dict[str, ShardSet] = {}

    @torch.no_grad()
    def run(self, unit: ScoringUnit) -> None:
        """Make the part of a unit.

        Raises:
            NumericsError: a likelihood is not finite.
        """
        if unit.path not in self._sets:
            self._sets[unit.path] = ShardSet(unit.path)
        shards = self._sets[unit.path]
        bit_depth = shards.manifest.bit_depth
        protocol = scoring_protocol(bit_depth, self._settings)
        bits: list[list[np.ndarray]] = [[] for _ in self._flows]
        compressed: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        origins: list[str] = []
        for low in range(unit.part.start, unit.part.stop, self._settings.batch_size):
            stored = shards.read(np.arange(low, min(low + self._settings.batch_size, unit.part.stop)))
            batch = shards.decoded(stored)
            origins += [shards.origin_of(sample) for sample in stored]
            draws = [x.to(self._device) for x in dequantized_draws(batch, protocol)]
            for flow, costs in zip(self._flows, bits, strict=True):
                log_prob = combine_draws(torch.stack([self._log_prob(flow, x) for x in draws]), "importance")
                costs.append(bits_per_dim(log_prob, flow.num_dims, bit_depth).cpu().numpy())
            compressed.append(compressed_bits_per_dim(np.ascontiguousarray(batch.events) >> (8 - bit_depth)))
            labels.append(batch.labels)
        arrays = {f"bits_{number}": np.concatenate(costs) for number, costs in enumerate(bits)}
        for costs in arrays.values():
            if not np.isfinite(costs).all():
                raise NumericsError(
                    f"bits/dim are not finite for {int((~np.isfinite(costs)).sum())} of the images {unit.part.start} "
                    f"to {unit.part.stop - 1} of {unit.path}; check the model"
                )
        arrays |= {"compressed": np.concatenate(compressed), "labels": np.concatenate(labels)}
        unit.part.write(arrays | {"origins": np.array(origins)})

    def _log_prob(self, flow: Flow, x: Tensor) -> Tensor:
        """Log density in fp64. It uses no true labels: the flow gets none, or densities are averaged over labels."""
        drop = flow.num_classes is None or self._settings.labels == "dropped"
        return (flow.log_prob_of_images(x, None) if drop else marginal_log_prob(flow, x)).double()
