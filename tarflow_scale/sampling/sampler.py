"""Draw images from a flow by their sample indices.

Image i depends only on (weights, seed, i, sampling settings). Its latent comes from a counter-based generator, and its
label depends on i. Another batch size or thread count changes the last bits of floats, and in rare cases a pixel by one
level; the generation plan fixes both, so that images are equal byte by byte.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tarflow_scale.config.sampling import Guidance, Labels, SamplingConfig
from tarflow_scale.errors import ConfigError, NumericsError, PlanError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.flows.latents import latents
from tarflow_scale.flows.likelihood import quantize
from tarflow_scale.flows.weights import tensors_digest
from tarflow_scale.records import BlockDecoding, Calibration
from tarflow_scale.sampling.batch_size import fitting_batch
from tarflow_scale.sampling.calibration import measure_blocks, measured_with, schedules_of, timed
from tarflow_scale.sampling.decode import BlockCost, TarFlowDecoder, decoder_of
from tarflow_scale.sampling.labels import balanced_labels, check_labels, labels_of

__all__ = ["Sampler", "calibrate"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
_ENCODED_BACK = 4
"""Number of images of a batch that are encoded again to measure the error of decoding."""
_DENOISED_AT_ONCE = 4
"""A batch is denoised in this many parts, one after the other, because denoising stores all activations."""


class Sampler:
    """Draws images from a flow.

    Args:
        flow: a flow in evaluation mode; its ``pixels`` define how floats are converted to pixels.
        seed: seed of the latents.
        settings: the section ``sampling``.
        calibration: chunk sizes of the blocks; required by ``decoder.kind=adaptive``.
        labels: rule that gives the label of each index, for a flow with classes.

    Raises:
        ConfigError: settings have no effect on this flow, or the batch does not fit in memory.
        PlanError: the calibration was measured on other weights or with other settings.
    """

    def __init__(
        self,
        flow: Flow,
        seed: int,
        settings: SamplingConfig,
        calibration: Calibration | None = None,
        labels: Labels = "balanced",
    ) -> None:
        check_labels(labels, flow.num_classes)
        self._rule: Labels = labels
        example = balanced_labels(range(1), flow.num_classes) if flow.num_classes else None
        try:
            guided = flow.is_guided(example, settings.guidance)
        except ValueError as error:
            raise ConfigError(f"sampling.guidance: {error}") from error
        noise = flow.pixels.noise if flow.pixels else "unknown"
        if settings.denoise > 0 and noise != "gaussian":
            raise ConfigError(
                f"sampling.denoise needs a model trained with Gaussian noise (got {settings.denoise:g} for {noise} "
                f"noise); set it to 0"
            )
        self._flow = flow
        self._seed = seed
        self._settings = settings
        self._device = next(flow.parameters()).device
        self.decoder = _decoder(flow, settings)
        """Decoder of a TarFlow; None for other flows."""
        self._schedules = None
        if settings.decoder.kind == "adaptive":
            self._schedules = schedules_of(_checked(calibration, flow, settings).blocks, settings.decoder.tolerance)
        chunk = max((schedule.chunk for schedule in self._schedules), default=1) if self._schedules else 1
        per_image = (1 + guided) * self.decoder.bytes_per_row(chunk) if self.decoder else 4 * flow.num_dims
        self.batch_size = fitting_batch(settings.batch_size, per_image, self._device)
        """Number of images that are decoded together."""
        self._latest: tuple[Tensor, Tensor | None, Tensor] | None = None
        self.costs: list[BlockCost] = []
        """Cost of each block for the latest batch, in the order of decoding."""

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Labels ``(len(indices),)`` int64 of these images; None for a flow without classes."""
        classes = self._flow.num_classes
        return labels_of(self._rule, indices, classes, self._seed) if classes else None

    @torch.no_grad()
    def draw(self, indices: Sequence[int], attempt: int = 0) -> Tensor:
        """Draw continuous images ``(b, C, H, W)``, at most `batch_size` of them; their values are not checked.

        Args:
            indices: indices of the images.
            attempt: number of the attempt, see `tarflow_scale.flows.latents`.
        """
        settings = self._settings
        z = settings.temperature * latents(self._seed, indices, self._flow.num_dims, attempt)
        labels = self.labels(indices)
        labels = None if labels is None else labels.to(self._device)
        x = self._decoded(z.to(self._device), labels)
        if not attempt:
            self._latest = z[:_ENCODED_BACK], None if labels is None else labels[:_ENCODED_BACK], x[:_ENCODED_BACK]
        return self._flow.shown(self._denoised(x, labels) if settings.denoise > 0 else x)

    def floats(self, indices: range) -> Iterator[Tensor]:
        """Draw batches of continuous images ``(b, C, H, W)``; values may lie outside [-1, 1].

        Raises:
            NumericsError: a value is not finite.
        """
        for low in range(0, len(indices), self.batch_size):
            part = indices[low : low + self.batch_size]
            x = self.draw(part)
            if not bool(torch.isfinite(x).all()):
                raise NumericsError(
                    f"the model produced values that are not finite (images {part.start} to {part.stop - 1}); check "
                    f"its training, or lower sampling.guidance.scale and sampling.temperature"
                )
            yield x

    def images(self, indices: range) -> Tensor:
        """Draw stored pixels ``(len(indices), C, H, W)`` uint8 on the CPU; the rounding inverts the training noise.

        Raises:
            ValueError: the flow has no pixel format.
            NumericsError: a value is not finite.
        """
        return torch.cat([self._flow.stored(x).cpu() for x in self.floats(indices)])

    @torch.no_grad()
    def round_trip_error(self) -> float | None:
        """Largest difference between latents and the encodings of their images, for a few images of the latest batch.

        It is None with guidance, before the first batch, or if the difference is not finite. It is below 1e-3 for an
        exact flow in fp32, and larger if the inverse of the model contracts strongly.
        """
        if self._latest is None or self._settings.guidance.scale > 0:
            return None
        z, y, x = self._latest
        back, _ = self._flow(x, y)
        error = float((back.cpu() - z).abs().max())
        return error if math.isfinite(error) else None  # it is not finite for images that the guard draws again

    def _decoded(self, z: Tensor, y: Tensor | None) -> Tensor:
        decoder = self.decoder
        if decoder is None:
            return self._flow.inverse(z, y, self._settings.guidance)

        def decode(z: Tensor, y: Condition, guidance: Guidance | None) -> Tensor:
            x, self.costs = decoder(z, y, guidance, self._schedules)
            return x

        return self._flow.inverse(z, y, self._settings.guidance, decode)

    def _denoised(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert self._flow.pixels is not None
        std, size = self._flow.pixels.noise_std, -(-len(x) // _DENOISED_AT_ONCE)
        labels = [None] * _DENOISED_AT_ONCE if y is None else list(y.split(size))
        parts = zip(x.split(size), labels, strict=False)
        return torch.cat([self._flow.denoised(a, b, std, self._settings.denoise) for a, b in parts])


@torch.no_grad()
def calibrate(flow: Flow, seed: int, settings: SamplingConfig) -> Calibration:
    """Measure the fastest chunk size of each block on this device, and the resulting error of images.

    It decodes the first batch of ``seed`` with all sizes, see `tarflow_scale.sampling.calibration`. If exact decoding
    of all blocks together is at least as fast as the best sizes, the result is exact decoding.

    Raises:
        ConfigError: settings have no effect on this flow, or the batch does not fit in memory.
    """
    exact = settings.model_copy(update={"decoder": settings.decoder.model_copy(update={"kind": "exact"})})
    sampler = Sampler(flow, seed, exact)
    decoder, device = sampler.decoder, next(flow.parameters()).device
    if decoder is None:
        raise ConfigError(
            f"only a TarFlow can be calibrated (got {type(flow).__name__}); use sampling.decoder.kind=exact"
        )
    indices = range(sampler.batch_size)
    z = (settings.temperature * latents(seed, indices, flow.num_dims)).to(device)
    y = balanced_labels(indices, flow.num_classes).to(device) if flow.num_classes else None
    guidance = settings.guidance if flow.is_guided(y, settings.guidance) else None
    tolerance = settings.decoder.tolerance
    blocks = measure_blocks(decoder, z, y, guidance, tolerance)

    def decoded(blocks: Sequence[BlockDecoding]) -> tuple[Tensor, list[BlockCost]]:
        x, costs = decoder(z, y, guidance, schedules_of(blocks, tolerance))
        return x.cpu(), costs

    one_by_one = [BlockDecoding(chunk=1, planned=1)] * len(blocks)
    (reference, reference_costs), exact_seconds = timed(partial(decoded, one_by_one), device)
    (images, costs), seconds = timed(partial(decoded, blocks), device)
    if seconds >= exact_seconds:  # sizes that are the fastest for single blocks may be slower together
        blocks, images, costs, seconds = one_by_one, reference, reference_costs, exact_seconds
    errors = (reference - images).abs()
    levels = [quantize(x, 8, "nearest").int() for x in (reference, images)]
    return Calibration(
        tensors_digest=tensors_digest(flow),
        device=_device_name(device),
        batch_size=sampler.batch_size,
        guidance=settings.guidance,
        precision=settings.decoder.precision,
        tolerance=tolerance,
        blocks=tuple(blocks),
        iterations=tuple(sum(cost.iterations) / len(cost.iterations) for cost in costs),
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        pixels_within_one_level=float(((levels[0] - levels[1]).abs() <= 1).float().mean()),
        exact_seconds=exact_seconds,
        adaptive_seconds=seconds,
    )


def _decoder(flow: Flow, settings: SamplingConfig) -> TarFlowDecoder | None:
    decoder = decoder_of(flow, _DTYPES[settings.decoder.precision])
    if decoder is not None:
        return decoder
    name = type(flow).__name__
    if settings.decoder.kind != "exact" or settings.decoder.precision != "fp32":
        raise ConfigError(f"sampling.decoder is for TarFlow (got {name}, which has a single decoder); remove it")
    if settings.guidance.blocks != "all":
        raise ConfigError(f"sampling.guidance.blocks=first is for TarFlow (got {name}); use all")
    return None


def _checked(calibration: Calibration | None, flow: Flow, settings: SamplingConfig) -> Calibration:
    if calibration is None:
        raise ConfigError(
            "sampling.decoder.kind=adaptive needs a calibration of this version (got none); run generate with "
            "--calibrate first, or use exact"
        )
    if calibration.tensors_digest != tensors_digest(flow):
        raise PlanError("the calibration was measured on other weights; run generate with --calibrate again")
    if not measured_with(calibration, settings):
        raise PlanError(
            "the calibration was measured with a different guidance, precision or tolerance; run generate with "
            "--calibrate again"
        )
    return calibration


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
