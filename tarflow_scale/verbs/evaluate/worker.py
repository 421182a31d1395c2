"""The worker of ``evaluate``: compute features, moments or likelihoods of a range of images, and store them as a part.

Sample i depends only on (model, seed, i), and the boundaries of parts are fixed. So every worker that makes a part gets
the same numbers. Images are not sent to other processes.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.autoencoders.contract import from_stored
from tarflow_scale.autoencoders.similarity import psnr, ssim
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.evaluate import ReferenceConfig
from tarflow_scale.config.protocols import (
    BitsPerDimProtocol,
    BoundProtocol,
    LatentNatsProtocol,
    LikelihoodProtocol,
    NatsProtocol,
    PerImageProtocol,
    SimilarityProtocol,
)
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.errors import ConfigError, NumericsError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.likelihood import bits_per_dim, combine_draws, quantize
from tarflow_scale.loading import calibration_for, load_autoencoder, load_version, worker_device
from tarflow_scale.metrics.bits import dequantized_draws, sample_hashes
from tarflow_scale.metrics.bound import bits_per_dim_bound
from tarflow_scale.metrics.features import Extractor, open_extractor
from tarflow_scale.metrics.frechet import Moments
from tarflow_scale.metrics.parts import Arrays, FeatureSet, Images, Part, PartUnit
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.registry import Registry
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.images import contact_sheet
from tarflow_scale.shards.reader import Batch, ShardSet
from tarflow_scale.training.noise import model_input

__all__ = ["GRID_NAME", "EvaluationUnit", "Scorer"]

GRID_NAME = "grid.png"
"""File name of the picture of the first samples; it is stored in the same folder as the features of the samples."""
_GRID_IMAGES, _GRID_COLUMNS = 64, 8
_IMAGES_AT_ONCE = 128
"""Batch size for scoring and reading if ``sampling.batch_size`` is not set."""
_RECONSTRUCTED_AT_ONCE = 16
"""Batch size of autoencoders, which have large feature maps."""


@dataclass(frozen=True)
class EvaluationUnit(PartUnit):
    """A part to make: features of a set of images, or values that a protocol measures for each sample."""

    work: FeatureSet | PerImageProtocol


class Scorer:
    """Holds the flow or the autoencoder, and the open data sets; makes one part at a time.

    Args:
        version: ``(registry, model, version)`` of the model; None if only references are computed.
        data: the split to score.
        reference: the reference images.
        sampling: the section ``sampling``.
        extractor_weights: path of the weights file of each extractor.
        threads: number of torch threads.
        gpu: whether this worker was given a GPU.
    """

    def __init__(
        self,
        version: tuple[str, str, int] | None,
        data: DataSetConfig,
        reference: ReferenceConfig,
        sampling: SamplingConfig,
        extractor_weights: dict[str, str],
        threads: int,
        gpu: bool,
    ) -> None:
        torch.set_num_threads(threads)
        self._device = worker_device(gpu)
        self._reference = ShardSet(reference.path)
        self._sampling = sampling
        self._batch_size = sampling.batch_size or _IMAGES_AT_ONCE
        self._weights = extractor_weights
        self._extractors: dict[tuple[str, tuple[str, ...], int], Extractor] = {}
        if version is not None:
            registry, model, number = version
            self._data = ShardSet(data.path, data.verify)
            if Registry(registry, model).resolve(number).is_autoencoder:
                self._autoencoder = load_autoencoder(registry, model, number)[0].to(self._device)
                return
            self._flow = load_version(registry, model, number).to(self._device)
            self._decoding = calibration_for(Registry(registry, model), number, sampling, gpu)
            self._samplers = {0: Sampler(self._flow, 0, sampling, self._decoding)}  # refuses settings that do not fit

    def run(self, unit: EvaluationUnit) -> None:
        """Make the part of a unit."""
        if isinstance(unit.work, PerImageProtocol):
            unit.part.write(self._values(unit.part, unit.work))
        else:
            unit.part.write(self._features(unit.part, unit.work))

    @torch.no_grad()
    def _values(self, part: Part, protocol: PerImageProtocol) -> Arrays:
        """Compute the value of each sample, and its hash. The keys are the name of the metric and ``hashes``."""
        values: list[np.ndarray] = []
        hashes: list[str] = []
        if isinstance(protocol, LikelihoodProtocol):
            _check_fits(self._flow, protocol)
        for batch in self._data.batches(part.start, part.stop, self._batch_size):
            values.append(self._value(batch, protocol).double().cpu().numpy())
            hashes.extend(sample_hashes(batch))
        return {protocol.metric: np.concatenate(values), "hashes": np.array(hashes)}

    def _value(self, batch: Batch, protocol: PerImageProtocol) -> Tensor:
        match protocol:
            case SimilarityProtocol():
                decoded = self._reconstructed(batch, protocol.bit_depth, "nearest")
                original = from_stored(torch.from_numpy(np.ascontiguousarray(batch.events)))
                return (psnr if protocol.metric == "psnr" else ssim)(original, from_stored(decoded))
            case NatsProtocol():
                return self._nats(batch, protocol)
            case LatentNatsProtocol():
                return self._latent_nats(batch, protocol)
            case BitsPerDimProtocol():
                return self._bits(batch, protocol)
            case BoundProtocol():
                return bits_per_dim_bound(self._flow, batch, self._labels(batch, protocol), protocol)

    def _bits(self, batch: Batch, protocol: BitsPerDimProtocol) -> Tensor:
        y = self._labels(batch, protocol)
        draws = [self._flow.log_prob_of_images(x.to(self._device), y) for x in dequantized_draws(batch, protocol)]
        log_prob = combine_draws(torch.stack(draws).double(), protocol.estimate)
        return bits_per_dim(log_prob, self._flow.num_dims, protocol.bit_depth)

    def _nats(self, batch: Batch, protocol: NatsProtocol) -> Tensor:
        given = batch.conditions if self._flow.num_conditions is not None else None
        y = self._labels(batch, protocol) if given is None else torch.from_numpy(given).to(self._device)
        return -self._flow.log_prob(torch.from_numpy(batch.events).to(self._device), y)

    def _latent_nats(self, batch: Batch, protocol: LatentNatsProtocol) -> Tensor:
        """Nats per dimension. Draw k has the random numbers that training uses in epoch k; validation uses epoch 0."""
        assert self._flow.pixels is not None
        log_probs: list[Tensor] = []
        for draw in range(protocol.num_draws):
            numbered = replace(batch, epochs=np.full_like(batch.epochs, draw))
            x = model_input(numbered, self._flow.pixels, protocol.seed, self._device)
            log_probs.append(self._flow.log_prob(x, self._labels(batch, protocol)).double())
        return -combine_draws(torch.stack(log_probs), "mean") / self._flow.num_dims

    def _labels(self, batch: Batch, protocol: LikelihoodProtocol) -> Tensor | None:
        given = protocol.labels == "given" and self._flow.num_classes is not None
        return torch.from_numpy(batch.labels).to(self._device) if given else None

    @torch.no_grad()
    def _reconstructed(self, batch: Batch, bit_depth: int, rounding: Literal["floor", "nearest", "truncate"]) -> Tensor:
        """Images ``(B, K, H, W)`` uint8 on the CPU, decoded from the means of the latents of a batch."""
        images = torch.from_numpy(np.ascontiguousarray(batch.events))
        parts: list[Tensor] = []
        for x in images.split(_RECONSTRUCTED_AT_ONCE):
            latent = self._autoencoder.encode(from_stored(x.to(self._device)))
            parts.append(quantize(self._autoencoder.decode(latent.mean), bit_depth, rounding).cpu())
        return torch.cat(parts)

    def _features(self, part: Part, features: FeatureSet) -> Arrays:
        arrays: Arrays = {}
        if features.images.kind == "sample":
            images = self._sampled(part, features.images)
            if part.start == 0:
                storage.write_bytes(storage.join(part.folder, GRID_NAME), self._grid(images))
        elif features.images.kind == "reconstruction":
            batch = self._data.take(np.arange(part.start, part.stop))
            images = self._reconstructed(batch, features.images.bit_depth, features.images.rounding)
        else:
            batch = self._real(part, features.images)
            images = torch.from_numpy(batch.events)
            arrays["hashes"] = np.array(sample_hashes(batch))
            if features.images.rounding == "truncate":
                images = quantize((images.float() / 255 - 0.5) / 0.5, 8, "truncate")
        extract = self._extractor(features)
        outputs = [extract(x) for x in images.split(self._batch_size)]
        for layer in features.layers:
            rows = torch.cat([output[layer] for output in outputs])
            if not bool(torch.isfinite(rows).all()):
                raise NumericsError(
                    f"features of {features.extractor} are not finite ({features.images.kind} images {part.start} to "
                    f"{part.stop - 1}); check the model and the weights of the extractor"
                )
            arrays |= Moments.of(rows).to_arrays(layer) if features.reduced else {layer: rows.numpy()}
        return arrays

    def _sampled(self, part: Part, images: Images) -> Tensor:
        assert images.seed is not None
        if images.seed not in self._samplers:
            self._samplers[images.seed] = Sampler(self._flow, images.seed, self._sampling, self._decoding)
        batches = self._samplers[images.seed].floats(range(part.start, part.stop))
        return torch.cat([quantize(x, images.bit_depth, images.rounding).cpu() for x in batches])

    def _grid(self, images: Tensor) -> bytes:
        """A picture of the first samples and their classes. With 2 to 16 classes, each column shows one class."""
        names, classes = self._flow.class_names, self._flow.num_classes or 0
        columns = classes if 1 < classes <= 2 * _GRID_COLUMNS else _GRID_COLUMNS
        shown = images[: max(1, min(_GRID_IMAGES, len(images)) // columns) * columns].numpy()
        labels = [names[i % classes] for i in range(len(shown))] if names else None
        zoom = max(1, 256 // (_GRID_COLUMNS * images.shape[-1]))
        return contact_sheet(shown, columns, zoom, labels)

    def _real(self, part: Part, images: Images) -> Batch:
        if images.seed is None:
            return self._reference.take(np.arange(part.start, part.stop))
        order = permutation(self._reference.manifest.num_images, Purpose.REFERENCE_SUBSET, images.seed)
        return self._reference.take(np.sort(order[: images.num])[part.start : part.stop])

    def _extractor(self, features: FeatureSet) -> Extractor:
        key = (features.extractor, features.layers, features.images.bit_depth)
        if key not in self._extractors:
            self._extractors[key] = open_extractor(features, self._weights, self._device)
        return self._extractors[key]


def _check_fits(flow: Flow, protocol: LikelihoodProtocol) -> None:
    """Raise an error if the flow cannot be measured by the protocol.

    A flow can be evaluated without labels, but a flow conditioned on numbers needs these numbers. Learned
    dequantization noise fits only the bit depth of its training data.
    """
    is_given = flow.num_conditions is not None
    if isinstance(protocol, NatsProtocol) and protocol.labels == "none" and is_given:
        raise ConfigError(
            f"protocol {protocol.name} must give labels to a flow that is conditioned on numbers (got labels: none, "
            f"and a flow that takes {flow.num_conditions} numbers); use labels: given"
        )
    learned = flow.pixels.bit_depth if flow.dequantizer is not None and flow.pixels is not None else None
    if isinstance(protocol, BitsPerDimProtocol) and learned not in (None, protocol.bit_depth):
        raise ConfigError(
            f"protocol {protocol.name} needs a model that learned its dequantization on {protocol.bit_depth}-bit data "
            f"(got {learned}-bit data); use a model without model.dequantization, or another protocol"
        )
