"""Sample indices to images.

Image i depends on (weights, seed, i, sampling settings): its latent is counter-based and its label follows from i.
Batch size and thread count change the last bits of a float, hence in rare cases a pixel by one level; whoever needs
equal bytes fixes them, as the generation plan does.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tarflow_scale.config.sampling import Guidance, Labels, SamplingConfig
from tarflow_scale.errors import ConfigError, NumericsError, PlanError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.flows.latents import latents
from tarflow_scale.flows.likelihood import quantize
from tarflow_scale.flows.weights import tensors_digest
from tarflow_scale.records import BlockPlan, DecodingPlan
from tarflow_scale.sampling.batch_size import fitting_batch
from tarflow_scale.sampling.calibration import blocks_one_by_one, measure_blocks, measured_with, schedules_of, timed
from tarflow_scale.sampling.decode import BlockReport, TarFlowDecoder, decoder_of
from tarflow_scale.sampling.labels import balanced_labels, check_labels, labels_of

__all__ = ["Sampler", "calibrate"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
_ENCODED_BACK = 4
"""Images of a batch that are encoded back to see how exact decoding was."""
_DENOISED_AT_ONCE = 4
"""Denoising keeps the activations of a whole pass, so it takes a batch in so many parts."""


class Sampler:
    """Draws images from a flow.

    Args:
        flow: in evaluation mode; its ``pixels`` say how floats become levels.
        seed: seed of the latents.
        settings: the section ``sampling``.
        plan: how blocks are decoded; ``decoder.kind=adaptive`` needs one.
        labels: which label an index has, for a flow with classes.

    Raises:
        ConfigError: settings that cannot have an effect on this flow, or do not fit in memory.
        PlanError: a plan that was measured on other weights or settings.
    """

    def __init__(
        self,
        flow: Flow,
        seed: int,
        settings: SamplingConfig,
        plan: DecodingPlan | None = None,
        labels: Labels = "balanced",
    ) -> None:
        check_labels(labels, flow.num_classes)
        self._rule: Labels = labels
        some = balanced_labels(range(1), flow.num_classes) if flow.num_classes else None
        try:
            guided = flow.is_guided(some, settings.guidance)
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
        """Of a TarFlow; None for other flows."""
        self._schedules = None
        if settings.decoder.kind == "adaptive":
            self._schedules = schedules_of(_checked(plan, flow, settings).blocks, settings.decoder.tolerance)
        chunk = max((one.chunk for one in self._schedules), default=1) if self._schedules else 1
        per_image = (1 + guided) * self.decoder.bytes_per_row(chunk) if self.decoder else 4 * flow.num_dims
        self.batch_size = fitting_batch(settings.batch_size, per_image, self._device)
        """Images decoded together."""
        self._latest: tuple[Tensor, Tensor | None, Tensor] | None = None
        self.reports: list[BlockReport] = []
        """What each block of the latest batch took, in the order of decoding."""

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """Labels ``(len(indices),)`` int64 of these images; None for a flow without classes."""
        classes = self._flow.num_classes
        return labels_of(self._rule, indices, classes, self._seed) if classes else None

    @torch.no_grad()
    def draw(self, indices: Sequence[int], attempt: int = 0) -> Tensor:
        """Continuous images ``(b, C, H, W)``, at most `batch_size`, whatever their values.

        Args:
            indices: of the images.
            attempt: see `tarflow_scale.flows.latents`.
        """
        settings = self._settings
        z = settings.temperature * latents(self._seed, indices, self._flow.num_dims, attempt)
        labels = self.labels(indices)
        labels = None if labels is None else labels.to(self._device)
        x = self._decoded(z.to(self._device), labels)
        if not attempt:
            self._latest = z[:_ENCODED_BACK], None if labels is None else labels[:_ENCODED_BACK], x[:_ENCODED_BACK]
        return self._denoised(x, labels) if settings.denoise > 0 else x

    def floats(self, indices: range) -> Iterator[Tensor]:
        """Batches of continuous images ``(b, C, H, W)`` on [-1, 1] and beyond.

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
        """Stored pixels ``(len(indices), C, H, W)`` uint8, quantised as the training noise asks, on the CPU.

        Raises:
            ValueError: when the flow does not know its pixel format.
            NumericsError: a value is not finite.
        """
        return torch.cat([self._flow.stored(x).cpu() for x in self.floats(indices)])

    @torch.no_grad()
    def round_trip_error(self) -> float | None:
        """Largest difference between latents of the latest batch and what its images encode to; None with guidance.

        An exact flow in fp32 stays below 1e-3; a model that shrinks what it decodes amplifies rounding on the way back.
        """
        if self._latest is None or self._settings.guidance.scale > 0:
            return None
        z, y, x = self._latest
        back, _ = self._flow(x, y)
        error = float((back.cpu() - z).abs().max())
        return error if math.isfinite(error) else None  # what was drawn again says nothing of decoding

    def _decoded(self, z: Tensor, y: Tensor | None) -> Tensor:
        decoder = self.decoder
        if decoder is None:
            return self._flow.inverse(z, y, self._settings.guidance)

        def decode(z: Tensor, y: Condition, guidance: Guidance | None) -> Tensor:
            x, self.reports = decoder(z, y, guidance, self._schedules)
            return x

        return self._flow.inverse(z, y, self._settings.guidance, decode)

    def _denoised(self, x: Tensor, y: Tensor | None) -> Tensor:
        assert self._flow.pixels is not None
        std, size = self._flow.pixels.noise_std, -(-len(x) // _DENOISED_AT_ONCE)
        labels = [None] * _DENOISED_AT_ONCE if y is None else list(y.split(size))
        parts = zip(x.split(size), labels, strict=False)
        return torch.cat([self._flow.denoised(a, b, std, self._settings.denoise) for a, b in parts])


@torch.no_grad()
def calibrate(flow: Flow, seed: int, settings: SamplingConfig) -> DecodingPlan:
    """Measure on this device how each block is decoded fastest, and how far the images are from exact ones.

    One batch of the seed's first images is decoded in all ways; see `tarflow_scale.sampling.calibration`. The plan is
    exact decoding where that is the fastest on the whole.

    Raises:
        ConfigError: settings that cannot have an effect on this flow, or do not fit in memory.
    """
    exact = settings.model_copy(update={"decoder": settings.decoder.model_copy(update={"kind": "exact"})})
    sampler = Sampler(flow, seed, exact)
    decoder, device = sampler.decoder, next(flow.parameters()).device
    if decoder is None:
        raise ConfigError(f"only a TarFlow is calibrated (got {type(flow).__name__}); leave decoder.kind at exact")
    indices = range(sampler.batch_size)
    z = (settings.temperature * latents(seed, indices, flow.num_dims)).to(device)
    y = balanced_labels(indices, flow.num_classes).to(device) if flow.num_classes else None
    guidance = settings.guidance if flow.is_guided(y, settings.guidance) else None
    tolerance = settings.decoder.tolerance
    blocks = measure_blocks(decoder, z, y, guidance, tolerance)
    ways = blocks_one_by_one(len(blocks)), blocks
    found, seconds, reports = [], [], []
    for way in ways:

        def run(way: Sequence[BlockPlan] = way) -> tuple[Tensor, list[BlockReport]]:
            x, reports = decoder(z, y, guidance, schedules_of(way, tolerance))
            return x.cpu(), reports

        (x, report), fastest = timed(run, device)
        found.append(x)
        reports.append(report)
        seconds.append(fastest)
    used = int(seconds[1] < seconds[0])  # what was chosen block by block may be no gain on the whole
    errors = (found[0] - found[used]).abs()
    levels = [quantize(x, 8, "nearest").int() for x in (found[0], found[used])]
    return DecodingPlan(
        tensors_digest=tensors_digest(flow),
        device=_device_name(device),
        batch_size=sampler.batch_size,
        guidance=settings.guidance,
        precision=settings.decoder.precision,
        tolerance=tolerance,
        blocks=tuple(ways[used]),
        iterations=tuple(sum(one.iterations) / len(one.iterations) for one in reports[used]),
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        pixels_within_one_level=float(((levels[0] - levels[1]).abs() <= 1).float().mean()),
        exact_seconds=seconds[0],
        adaptive_seconds=seconds[used],
    )


def _decoder(flow: Flow, settings: SamplingConfig) -> TarFlowDecoder | None:
    decoder = decoder_of(flow, _DTYPES[settings.decoder.precision])
    if decoder is not None:
        return decoder
    name = type(flow).__name__
    if settings.decoder.kind != "exact" or settings.decoder.precision != "fp32":
        raise ConfigError(f"sampling.decoder is for TarFlow (got {name}, which has one way); leave it out")
    if settings.guidance.blocks != "all":
        raise ConfigError(f"sampling.guidance.blocks=first is for TarFlow (got {name}); use all")
    return None


def _checked(plan: DecodingPlan | None, flow: Flow, settings: SamplingConfig) -> DecodingPlan:
    if plan is None:
        raise ConfigError(
            "sampling.decoder.kind=adaptive needs a plan for this version (got none); run the verb generate with "
            "--calibrate first, or use exact"
        )
    if plan.tensors_digest != tensors_digest(flow):
        raise PlanError("the decoding plan was measured on other weights; run generate with --calibrate again")
    if not measured_with(plan, settings):
        raise PlanError(
            "the decoding plan was measured with other guidance, precision or tolerance; run generate with "
            "--calibrate again"
        )
    return plan


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
