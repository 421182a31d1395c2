"""Verb ``evaluate``: a registered version to numbers that carry their protocol, attached to the version.

Resolve the version, make the units of work, run them on workers, merge what comes back in the order of the units,
measure the baselines by the same protocols, and attach the report. Workers return moments, log-likelihoods and
hashes of pixels, never images; the merge does not depend on who did what, so Ray and a single process agree.
"""

import math
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tarflow_scale import telemetry
from tarflow_scale.config import (
    BitsPerDimProtocol,
    ClusterConfig,
    DataSetConfig,
    EvaluateConfig,
    FrechetProtocol,
    ReferenceConfig,
    SamplingConfig,
    VersionConfig,
    load_protocol,
)
from tarflow_scale.errors import ConfigError, DataError, NumericsError
from tarflow_scale.flows.likelihood import bits_per_dim, combine_draws, quantize
from tarflow_scale.loading import decoding_plan, load_version, worker_device
from tarflow_scale.metrics.baseline import PixelGaussian, gaussian_for
from tarflow_scale.metrics.bits import dequantised, gaussian_bits_per_dim, pixel_hashes
from tarflow_scale.metrics.features import open_extractor, weights_digest
from tarflow_scale.metrics.frechet import Moments, frechet_distance
from tarflow_scale.metrics.gather import Results, Unit, UnitKind, UnitResult
from tarflow_scale.metrics.reference import Reference, ReferenceCache
from tarflow_scale.metrics.report import protocol_id
from tarflow_scale.pool import run_units
from tarflow_scale.randomness import Purpose, permutation
from tarflow_scale.records import MetricsReport, MetricValue, ModelVersion
from tarflow_scale.registry import Registry
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.manifest import Manifest, read_manifest
from tarflow_scale.shards.reader import ShardSet

__all__ = ["Scorer", "run"]

_IMAGES_AT_ONCE = 128
"""Scored or read, where the section ``sampling`` leaves the number open."""

_UNIT_IMAGES = 250
"""Images of a unit of work: small enough to balance workers, large enough to hide the call."""


def run(config: EvaluateConfig, dry_run: bool) -> None:
    """Measure every protocol and attach the report.

    Raises:
        UserError: version, data, reference or protocol do not fit together.
    """
    started = time.monotonic()
    registry = Registry(config.registry.path, config.registry.model)
    version = registry.resolve(config.registry.version)
    protocols = {path: load_protocol(path) for path in config.metrics.protocols}
    data, reference = read_manifest(config.data.path), read_manifest(config.reference.path)
    _check(version, data, reference, list(protocols.values()))
    caches = {
        path: ReferenceCache(
            config.reference.cache,
            weights_digest(protocol, config.metrics.extractor_weights),
            reference,
            protocol,
        )
        for path, protocol in protocols.items()
        if isinstance(protocol, FrechetProtocol)
    }
    known = {path: cache.read() for path, cache in caches.items()}
    units = _units(protocols, data.num_images, reference.num_images, known, config)
    _print_plan(config, version, protocols, units)
    if dry_run:
        return

    results = _run(units, _worker_arguments(config, version, protocols), config.cluster)
    values: dict[str, MetricValue] = {}
    baselines: dict[str, float] = {}
    gaussian: PixelGaussian | None = None
    for path, protocol in sorted(protocols.items(), key=lambda item: item[1].metric, reverse=True):
        if isinstance(protocol, FrechetProtocol):
            found = known[path] or _bind_reference(path, results, caches[path])
            values[protocol.name] = _frechet_value(path, protocol, results, found, config)
            if config.metrics.baselines:
                gaussian = gaussian_for(protocol, found.moments) or gaussian
                baselines |= _frechet_baselines(path, protocol, results, found.moments, gaussian)
        else:
            values[protocol.name] = _bits_value(path, protocol, results)
            if gaussian is not None:
                baselines[f"gaussian_{protocol.name}"] = gaussian_bits_per_dim(
                    gaussian, protocol, ShardSet(config.data.path)
                )
    report = MetricsReport(
        model=config.registry.model,
        version=version.version,
        weights_digest=version.weights_digest,
        metrics=values,
        baselines=baselines,
        sampling=config.sampling.model_dump(mode="json"),
        seconds=time.monotonic() - started,
        packages=telemetry.package_versions(),
    )
    registry.attach_report(report, reason=f"evaluated on {data.name}/{data.split}")
    _print_report(report)


# -- what a worker does ------------------------------------------------------------------------------------------------


class Scorer:
    """Holds the flow and the open data sets; does one unit at a time.

    Args:
        registry: where the version is.
        version: its number.
        data: the split to score.
        reference: the reference images.
        sampling: the section.
        protocols: protocols by the path of their file, which need not exist on the worker.
        extractor_weights: path of the extractor's weights, or None.
        threads: torch threads.
        gpu: whether this worker was given a GPU.
    """

    def __init__(
        self,
        registry: VersionConfig,
        version: int,
        data: DataSetConfig,
        reference: ReferenceConfig,
        sampling: SamplingConfig,
        protocols: dict[str, BitsPerDimProtocol | FrechetProtocol],
        extractor_weights: str | None,
        threads: int,
        gpu: bool,
    ) -> None:
        torch.set_num_threads(threads)
        self._device = worker_device(gpu)
        self._flow = load_version(registry.path, registry.model, version).to(self._device)
        self._decoding = decoding_plan(Registry(registry.path, registry.model), version, sampling, gpu)
        self._samplers = {0: Sampler(self._flow, 0, sampling, self._decoding)}  # refuses what does not fit at once
        self._data = ShardSet(data.path, data.verify)
        self._reference = ShardSet(reference.path)
        self._sampling = sampling
        self._protocols = protocols
        self._extractors = {
            path: open_extractor(protocol, extractor_weights, self._device)
            for path, protocol in protocols.items()
            if isinstance(protocol, FrechetProtocol)
        }

    def run(self, unit: Unit) -> UnitResult:
        """Score, sample or read a range of images."""
        protocol = self._protocols[unit.protocol]
        batch_size = self._sampling.batch_size or _IMAGES_AT_ONCE
        if isinstance(protocol, BitsPerDimProtocol):
            return self._score(unit, protocol, batch_size)
        match unit.kind:
            case "sample":
                images = self._samples(unit, protocol)
                hashes: tuple[str, ...] = ()
            case "real":
                images, hashes = self._real(unit, protocol), ()
            case _:
                batches = list(self._reference.batches(unit.start, unit.stop, batch_size))
                images = torch.cat([torch.from_numpy(batch.images) for batch in batches])
                hashes = tuple(hash_ for batch in batches for hash_ in pixel_hashes(batch))
        features = torch.cat([self._extractors[unit.protocol](part) for part in images.split(batch_size)])
        if not bool(torch.isfinite(features).all()):
            raise NumericsError(
                f"features of {protocol.name} are not finite (unit {unit.kind} {unit.start}); check the model"
            )
        return UnitResult(moments=Moments.of(features), hashes=hashes)

    @torch.no_grad()
    def _score(self, unit: Unit, protocol: BitsPerDimProtocol, batch_size: int) -> UnitResult:
        bits: list[NDArray[np.float64]] = []
        hashes: list[str] = []
        for batch in self._data.batches(unit.start, unit.stop, batch_size):
            labels = protocol.labels == "given" and self._flow.num_classes is not None
            y = torch.from_numpy(batch.labels).to(self._device) if labels else None
            draws = [self._flow.log_prob(x.to(self._device), y) for x in dequantised(batch, protocol)]
            log_prob = combine_draws(torch.stack(draws).double(), protocol.estimate)
            bits.append(bits_per_dim(log_prob, self._flow.num_dims, protocol.bit_depth).cpu().numpy())
            hashes.extend(pixel_hashes(batch))
        return UnitResult(bits=np.concatenate(bits), hashes=tuple(hashes))

    def _samples(self, unit: Unit, protocol: FrechetProtocol) -> torch.Tensor:
        if protocol.seed not in self._samplers:
            self._samplers[protocol.seed] = Sampler(self._flow, protocol.seed, self._sampling, self._decoding)
        parts = self._samplers[protocol.seed].floats(range(unit.start, unit.stop))
        return torch.cat([quantize(x, protocol.bit_depth, protocol.rounding).cpu() for x in parts])

    def _real(self, unit: Unit, protocol: FrechetProtocol) -> torch.Tensor:
        manifest = self._reference.manifest
        order = permutation(manifest.num_images, Purpose.REFERENCE_SUBSET, protocol.seed)
        chosen = np.sort(order[: protocol.num_images])[unit.start : unit.stop]
        return torch.from_numpy(self._reference.take(chosen).images)


# -- what the driver does ----------------------------------------------------------------------------------------------


def _check(
    version: ModelVersion, data: Manifest, reference: Manifest, protocols: list[BitsPerDimProtocol | FrechetProtocol]
) -> None:
    """Refuse what cannot be measured, before any work."""
    names = [protocol.name for protocol in protocols]
    if len(set(names)) < len(names):
        raise ConfigError(f"protocols of one evaluation must have different names (got {', '.join(names)}); drop one")
    for manifest in (data, reference):
        size, channels = version.data.image_size_pixels, version.data.num_channels
        if (manifest.image_size_pixels, manifest.num_channels) != (size, channels):
            raise DataError(
                f"the model makes {channels}x{size}x{size} images (got {manifest.event_shape} in {manifest.name}/"
                f"{manifest.split}); evaluate on data of that shape"
            )
        for protocol in protocols:
            if protocol.bit_depth != manifest.bit_depth:
                raise ConfigError(
                    f"protocol {protocol.name} is for {protocol.bit_depth}-bit data (got {manifest.bit_depth} in "
                    f"{manifest.name}/{manifest.split}); choose another protocol"
                )
    if version.data.class_names and data.class_names != version.data.class_names:
        raise DataError(
            f"the model knows {len(version.data.class_names)} classes by name (got {len(data.class_names)} others in "
            f"{data.name}/{data.split}); evaluate on data with the same classes"
        )
    for protocol in protocols:
        if isinstance(protocol, BitsPerDimProtocol) and version.pixels.noise != "uniform":
            raise ConfigError(
                f"protocol {protocol.name} needs a model trained with uniform noise (got {version.pixels.noise}); "
                f"a model of noisy data has no bits/dim"
            )


def _units(
    protocols: dict[str, BitsPerDimProtocol | FrechetProtocol],
    num_test: int,
    num_reference: int,
    known: dict[str, Reference | None],
    config: EvaluateConfig,
) -> list[Unit]:
    units: list[Unit] = []
    for path, protocol in protocols.items():
        if isinstance(protocol, BitsPerDimProtocol):
            units += _cut("score", path, num_test)
            continue
        units += _cut("sample", path, protocol.num_images)
        if known[path] is None:
            units += _cut("reference", path, num_reference)
        if config.metrics.baselines:
            units += _cut("real", path, min(protocol.num_images, num_reference))
    return units


def _cut(kind: UnitKind, path: str, num: int) -> list[Unit]:
    return [Unit(kind, path, low, min(low + _UNIT_IMAGES, num)) for low in range(0, num, _UNIT_IMAGES)]


def _worker_arguments(
    config: EvaluateConfig, version: ModelVersion, protocols: dict[str, BitsPerDimProtocol | FrechetProtocol]
) -> dict[str, Any]:
    return {
        "registry": config.registry,
        "version": version.version,
        "data": config.data,
        "reference": config.reference,
        "sampling": config.sampling,
        "protocols": protocols,
        "extractor_weights": config.metrics.extractor_weights,
        "threads": config.cluster.cpus_per_worker,
        "gpu": config.cluster.gpus_per_worker > 0,
    }


def _run(units: list[Unit], arguments: dict[str, Any], cluster: ClusterConfig) -> Results:
    results = Results()
    with telemetry.progress_bar(sum(unit.stop - unit.start for unit in units), "evaluate") as bar:
        for unit, result in run_units(Scorer, arguments, units, **cluster.model_dump()):
            results.add(unit, result)
            bar.update(unit.stop - unit.start)
    return results


def _bits_value(path: str, protocol: BitsPerDimProtocol, results: Results) -> MetricValue:
    bits = np.concatenate([part.bits for part in results.parts("score", path) if part.bits is not None])
    if not np.isfinite(bits).all():
        raise NumericsError(
            f"{protocol.name} is not finite for {int((~np.isfinite(bits)).sum())} images; check the model"
        )
    return MetricValue(
        value=float(bits.mean()),
        unit="bits/dim",
        standard_error=float(bits.std(ddof=1) / math.sqrt(len(bits))) if len(bits) > 1 else None,
        num_images=len(bits),
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        protocol_id=protocol_id(protocol, "none", results.images_digest("score", path)),
    )


def _frechet_value(
    path: str,
    protocol: FrechetProtocol,
    results: Results,
    reference: Reference,
    config: EvaluateConfig,
) -> MetricValue:
    extractor = weights_digest(protocol, config.metrics.extractor_weights)
    unit = f"levels of {protocol.bit_depth} bits, squared" if protocol.extractor == "pixels" else "FID"
    return MetricValue(
        value=frechet_distance(results.moments("sample", path), reference.moments),
        unit=unit,
        num_images=protocol.num_images,
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        protocol_id=protocol_id(protocol, extractor, reference.images_digest),
    )


def _bind_reference(path: str, results: Results, cache: ReferenceCache) -> Reference:
    """Merge the reference's parts and keep them; from here on the protocol is bound to these images."""
    reference = Reference(results.moments("reference", path), results.images_digest("reference", path))
    cache.write(reference)
    return reference


def _frechet_baselines(
    path: str,
    protocol: FrechetProtocol,
    results: Results,
    reference: Moments,
    gaussian: PixelGaussian | None,
) -> dict[str, float]:
    found = {f"real_{protocol.name}": frechet_distance(results.moments("real", path), reference)}
    if gaussian is not None and protocol.extractor == "pixels":
        levels = gaussian.sample_levels(protocol.num_images, protocol.seed)
        found[f"gaussian_{protocol.name}"] = frechet_distance(Moments.of(levels), reference)
    return found


# -- what is printed ---------------------------------------------------------------------------------------------------


def _print_plan(
    config: EvaluateConfig,
    version: ModelVersion,
    protocols: dict[str, BitsPerDimProtocol | FrechetProtocol],
    units: list[Unit],
) -> None:
    name = f"{config.registry.model}@{version.version}"
    workers = f"{config.cluster.num_workers} x {config.cluster.executor}"
    print(f"evaluate {name}: {version.parameters:,} parameters, {len(units)} units on {workers}")
    rows = [(p.name, p.metric, str(sum(u.stop - u.start for u in units if u.protocol == path)), p.digest[:12])
            for path, p in protocols.items()]  # fmt: skip
    print(telemetry.table(rows, ("protocol", "metric", "images", "digest")))


def _print_report(report: MetricsReport) -> None:
    rows: list[tuple[str, ...]] = []
    for name, metric in report.metrics.items():
        error = f"{metric.standard_error:.4f}" if metric.standard_error is not None else ""
        rows.append((f"{report.model}@{report.version} {name}", f"{metric.value:.4f}", error, metric.unit))
        for kind in ("gaussian", "real"):
            if f"{kind}_{name}" in report.baselines:
                rows.append((f"{kind} {name}", f"{report.baselines[f'{kind}_{name}']:.4f}", "", metric.unit))
    print(telemetry.table(rows, ("what", "value", "standard error", "unit")))
