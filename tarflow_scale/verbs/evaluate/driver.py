"""Verb ``evaluate``: measure a registered version by protocols, and attach the report to the version.

The driver resolves the version and lists the parts that the protocols need: features, moments or likelihoods of ranges
of images. Workers make the missing parts, then compute the numbers from them in rounds of tasks. The driver attaches
the report. Ray and a single process give the same numbers, and a killed evaluation continues where it stopped.
``--reference`` only computes the references of the protocols; ``--watch`` evaluates all versions until interrupted.

Reads the version from the registry, the split ``data.path``, the images ``reference.path`` and the protocols. Writes to
the registry: an event with the report, a picture of samples, and the likelihood of each image. Writes the references
and the parts to ``reference.cache``; the parts of the version are removed after its report is attached. It is an error
if images do not fit the model or the protocol, or if a protocol was bound to other reference images.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from tarflow_scale import storage
from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.autoencoders.similarity import SSIM_PIXELS
from tarflow_scale.autoencoders.stored import CONFIG_NAME, config_from_files
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.evaluate import EvaluateConfig
from tarflow_scale.config.protocols import (
    BitsPerDimProtocol,
    BoundProtocol,
    FrechetProtocol,
    LatentNatsProtocol,
    NatsProtocol,
    PerImageProtocol,
    load_protocol,
)
from tarflow_scale.errors import AlreadyReported, ConfigError, DataError, NumericsError, StorageError, UserError
from tarflow_scale.loading import load_autoencoder
from tarflow_scale.metrics.baseline import PixelGaussian, gaussian_for
from tarflow_scale.metrics.bits import gaussian_bits_per_dim, gaussian_nats
from tarflow_scale.metrics.frechet import Moments, frechet_distance, merged
from tarflow_scale.metrics.measure import Measured
from tarflow_scale.metrics.protocol_id import images_digest, protocol_id, unit_of
from tarflow_scale.metrics.reference import Binding
from tarflow_scale.pool import Pool
from tarflow_scale.records import FileRecord, MetricsReport, MetricValue, ModelVersion, canonical_json, changes
from tarflow_scale.registry import Lease, Registry
from tarflow_scale.runtime import console, provenance
from tarflow_scale.shards.events import LatentEvent, event_of
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.verbs.evaluate.job import Evaluation, moments_of
from tarflow_scale.verbs.evaluate.worker import EvaluationUnit

__all__ = ["bind", "run", "watch"]


def run(config: EvaluateConfig, dry_run: bool, once: bool = False) -> None:
    """Measure the version and attach the report; with ``once``, fail if the version already has these numbers.

    Raises:
        UserError: version, data, reference or protocol do not fit together.
    """
    started = time.monotonic()
    registry = Registry(config.registry.path, config.registry.model)
    version = registry.resolve(config.registry.version)  # resolved only once, so it stays the same version
    name = f"{registry.model}@{version.version}"
    if str(config.registry.version) != str(version.version):
        print(f"{config.registry.version} is {name}", flush=True)
    job = Evaluation(
        config.metrics, config.data, config.reference, config.sampling, config.cluster, (registry, version)
    )
    _check(registry, version, job)
    units = job.units()
    _print_plan(f"evaluate {name}: {version.parameters:,} parameters", job, units, config.cluster)
    if dry_run:
        return
    with Pool(**config.cluster.model_dump()) as pool:
        job.make(pool, units)
        if not all(isinstance(protocol, PerImageProtocol) for protocol in job.protocols.values()):
            print("comparing with the references; standard errors repeat this for each of 50 blocks", flush=True)
        bindings = job.bind()
        measured = job.measure(pool, bindings)
    values = {path: _value(job, path, measured, bindings) for path in job.protocols}
    report = MetricsReport(
        model=registry.model,
        version=version.version,
        weights_digest=version.weights_digest,
        metrics={
            job.protocols[path].name: value.model_copy(update={"per_image": _stored(registry, job, path)})
            for path, value in values.items()
        },
        baselines=_baselines(job, bindings, config.data.path, config.reference.path)
        if config.metrics.baselines
        else {},
        sampling=config.sampling,
        seconds=time.monotonic() - started,
        packages=provenance.package_versions(),
        grid=job.grid(registry),
    )
    registry.attach_report(report, f"evaluated on {job.data.name}/{job.data.split}", once)
    job.remove_parts()
    _print_report(report)


def watch(config: EvaluateConfig, dry_run: bool) -> None:
    """Evaluate every version of the model once, including versions that are registered later, until interrupted.

    Several processes may watch: a lease gives each version to one of them, and the log accepts only one report. A
    version that cannot be evaluated is reported and skipped.
    """
    model, registry = config.registry.model, Registry(config.registry.path, config.registry.model)
    protocols = {load_protocol(path).digest for path in config.metrics.protocols}
    leases = storage.join(config.reference.cache, "leases", storage.digest(canonical_json(sorted(protocols)))[:16])
    skipped: set[int] = set()
    print(f"watching {config.registry.path} for versions of {model}; press Ctrl-C to stop", flush=True)
    while True:
        for version in _unscored(registry, protocols) - skipped:
            section = config.registry.model_copy(update={"version": version})
            with Lease(storage.join(leases, model, str(version))) as lease:
                if lease is None or version not in _unscored(registry, protocols):
                    continue
                try:
                    run(config.model_copy(update={"registry": section}), dry_run, once=True)
                except (AlreadyReported, StorageError) as error:  # done by another process, or to be retried
                    print(error, file=sys.stderr, flush=True)
                except UserError as error:
                    print(f"{model}@{version} is skipped: {error}", file=sys.stderr, flush=True)
                    skipped.add(version)
        if dry_run:
            return
        time.sleep(config.metrics.watch_seconds)


def _unscored(registry: Registry, protocols: set[str]) -> set[int]:
    """Versions that are not yet measured by all protocols; empty if the registry does not have the model yet."""
    if not storage.exists(storage.join(registry.path, registry.model, "_log")):
        return set()
    state = registry.state()
    return {version for version in state.versions if not state.has_numbers(version, protocols)}


def bind(config: EvaluateConfig, dry_run: bool) -> None:
    """Compute the references of the protocols, and bind the protocols to them. No model is needed.

    Raises:
        UserError: reference and protocols do not fit together, or the protocols are bound to other images.
    """
    job = Evaluation(config.metrics, config.data, config.reference, config.sampling, config.cluster, None)
    units = job.units()
    _print_plan("bind references", job, units, config.cluster)
    if dry_run:
        return
    with Pool(**config.cluster.model_dump()) as pool:
        job.make(pool, units)
    bindings = job.bind().values()
    rows = [(binding.protocol, binding.data, binding.images_digest[:12]) for binding in bindings]
    print(console.table(rows, ("protocol", "bound to", "images")))


def _check(registry: Registry, version: ModelVersion, job: Evaluation) -> None:
    """Raise an error if the version does not fit the data or the protocols."""
    for protocol in job.protocols.values():
        if protocol.reconstructs != version.is_autoencoder:
            needed, got = ("an autoencoder", "a flow") if protocol.reconstructs else ("a flow", "an autoencoder")
            raise ConfigError(f"protocol {protocol.name} measures {needed} (got {got}); choose another protocol")
    if version.is_autoencoder:
        _check_images(load_autoencoder(registry.path, registry.model, version.version)[0], job)
        return
    trained = event_of(version.trained_on, version.pixels.bit_depth)
    for manifest in (job.data, job.reference):
        got, expected, found = manifest.event, trained.shown, str(manifest.event)
        if isinstance(got, LatentEvent):
            fits, rule = got == trained, f"be latents from the same run of encode as the training data, {trained}"
            if isinstance(trained, LatentEvent):
                found = changes(*(event.facts.model_dump(mode="json") for event in (trained, got)))
        else:
            fits = (got.shape, got.num_conditions) == (expected.shape, expected.num_conditions)
            rule = f"have the shape and the conditions of the training data, {expected.shape}"
        if not fits:
            raise DataError(
                f"the data must {rule} (got {found} in {manifest.name}/{manifest.split}); evaluate on data of the same "
                f"kind as the training data"
            )
    names = version.trained_on.class_names
    if names and job.data.class_names != names:
        raise DataError(
            f"the data must have the {len(names)} class names of the model (got "
            f"{len(job.data.class_names)} different class names in {job.data.name}/{job.data.split}); evaluate on data "
            f"with the same classes"
        )
    for protocol in job.protocols.values():
        if isinstance(protocol, BoundProtocol):
            _check_bound(registry, version, protocol)
        elif isinstance(protocol, BitsPerDimProtocol | LatentNatsProtocol):
            _check_noise(version, protocol)


def _check_images(autoencoder: Autoencoder, job: Evaluation) -> None:
    """Raise an error if the autoencoder cannot encode the images, or the images are too small for a protocol."""
    for manifest in (job.data, job.reference):
        try:
            autoencoder.latent_shape(manifest.event.carried_shape)
        except ValueError as error:
            raise DataError(f"{manifest.name}/{manifest.split}: {error}") from error
    side = min(job.data.event.carried_shape[1:])
    for protocol in job.protocols.values():
        if protocol.metric == "ssim" and side < SSIM_PIXELS:
            raise ConfigError(
                f"protocol {protocol.name} needs images with sides of at least {SSIM_PIXELS} pixels (got {side}); use "
                f"metric: psnr"
            )


def _check_noise(version: ModelVersion, protocol: BitsPerDimProtocol | LatentNatsProtocol) -> None:
    """Raise an error if the model was trained with other noise than the protocol needs."""
    noise, std = version.pixels.noise, version.pixels.noise_std
    if isinstance(protocol, LatentNatsProtocol):
        if std != protocol.noise_std:
            raise ConfigError(
                f"protocol {protocol.name} needs a model trained with a noise std of {protocol.noise_std} (got {std}), "
                f"because nats with different noise are not comparable; use a protocol with noise_std: {std}"
            )
    elif version.trained_on.latents is not None:
        raise ConfigError(
            f"protocol {protocol.name} needs a model of pixels (got a flow on latents, whose bits/dim have only a "
            f"bound); use a protocol with metric: bits_per_dim_bound"
        )
    elif noise != "uniform":
        raise ConfigError(
            f"protocol {protocol.name} needs a model trained with uniform noise (got {noise}); a model of noisy data "
            f"has no bits/dim"
        )


def _check_bound(registry: Registry, version: ModelVersion, protocol: BoundProtocol) -> None:
    """Raise an error if the version has no bound: it needs a probability of pixels and a density of latents."""
    latents = version.trained_on.latents
    if latents is None:
        raise ConfigError(
            f"protocol {protocol.name} needs a flow on latents (got a model of "
            f"{event_of(version.trained_on, version.pixels.bit_depth)}); use a protocol with metric: bits_per_dim"
        )
    content = registry.read(CONFIG_NAME, version.files[CONFIG_NAME])
    autoencoder = config_from_files({CONFIG_NAME: content}, f"{registry.model}@{version.version}")
    if autoencoder.bins is None or not latents.has_variance:
        lack = "a probability of pixels" if autoencoder.bins is None else "a variance of latents"
        raise ConfigError(
            f"protocol {protocol.name} needs an autoencoder with {lack} (got one of kind {autoencoder.kind} without "
            f"it); use a protocol with metric: latent_nats on latents, such as evals/protocols/latent-nats.yaml"
        )


def _costs(job: Evaluation, path: str) -> NDArray[np.float64]:
    """Bits/dim or nats of each sample, in the order of the split."""
    protocol = job.protocols[path]
    parts = [part.read(protocol.metric)[protocol.metric] for part in job.requirements[path].likelihoods]
    costs = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(costs).all():
        raise NumericsError(
            f"{protocol.name} is not finite for {int((~np.isfinite(costs)).sum())} samples; check the model"
        )
    return costs


def _hashes(job: Evaluation, path: str) -> Iterator[str]:
    """SHA-256 of the pixels of each sample, in the order of the split."""
    for part in job.requirements[path].likelihoods:
        yield from map(str, part.read("hashes")["hashes"])


def _value(
    job: Evaluation, path: str, measured: Mapping[str, Measured], bindings: Mapping[str, Binding]
) -> MetricValue:
    protocol = job.protocols[path]
    if isinstance(protocol, PerImageProtocol):
        costs = _costs(job, path)
        error = float(costs.std(ddof=1) / math.sqrt(len(costs))) if len(costs) > 1 else 0.0
        number, extractor, images = Measured(float(costs.mean()), error), "none", images_digest(_hashes(job, path))
    else:
        number, extractor = measured[path], job.extractors[path]
        images = bindings[path].images_digest if path in bindings else "none"
    if not math.isfinite(number.value):
        raise NumericsError(f"{protocol.name} is not finite (got {number.value}); check the model")
    return MetricValue(
        value=number.value,
        unit=unit_of(protocol),
        standard_error=number.standard_error,
        num_images=job.num_images(path),
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        protocol_id=protocol_id(protocol, extractor, images),
    )


def _stored(registry: Registry, job: Evaluation, path: str) -> FileRecord | None:
    """Store bits/dim or nats of each image in the registry, so that two models can be compared image by image."""
    if not isinstance(job.protocols[path], PerImageProtocol):
        return None
    hashes = list(map(bytes.fromhex, _hashes(job, path)))
    image = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
    return registry.keep(save_arrays({job.protocols[path].metric: _costs(job, path), "image_sha256": image}))


def _baselines(job: Evaluation, bindings: Mapping[str, Binding], data: str, reference: str) -> dict[str, float]:
    """Measure real images and a Gaussian with full covariance by the same protocols, where that is possible."""
    baselines: dict[str, float] = {}
    gaussian: PixelGaussian | None = None
    for path, protocol in job.protocols.items():
        if not isinstance(protocol, FrechetProtocol) or protocol.estimate != "plain":
            continue
        moments = Moments.stored(job.references.moments_location(bindings[path]), protocol.layer)
        real = job.requirements[path].real
        assert real is not None
        baselines[f"real_{protocol.name}"] = frechet_distance(merged(moments_of(real, protocol.layer)), moments)
        gaussian = gaussian_for(protocol, moments) or gaussian
        if gaussian is not None and not protocol.reconstructs and protocol.extractor == "pixels":
            levels = gaussian.sample_levels(protocol.num_images, protocol.seed)
            baselines[f"gaussian_{protocol.name}"] = frechet_distance(Moments.of(levels), moments)
    for protocol in job.protocols.values():
        if isinstance(protocol, BitsPerDimProtocol) and gaussian is not None:
            baselines[f"gaussian_{protocol.name}"] = gaussian_bits_per_dim(gaussian, protocol, ShardSet(data))
        elif isinstance(protocol, NatsProtocol):
            nats = gaussian_nats(ShardSet(reference), ShardSet(data))
            baselines |= {} if nats is None else {f"gaussian_{protocol.name}": nats}
    return baselines


# -- printed tables ----------------------------------------------------------------------------------------------------


def _print_plan(title: str, job: Evaluation, units: list[EvaluationUnit], cluster: ClusterConfig) -> None:
    print(f"{title}: {len(units)} parts, {cluster.num_workers} workers, cluster.executor={cluster.executor}")
    rows = [(protocol.name, protocol.metric, str(job.num_images(path))) for path, protocol in job.protocols.items()]
    print(console.table(rows, ("protocol", "metric", "images")))


def _print_report(report: MetricsReport) -> None:
    rows: list[tuple[str, ...]] = []
    for name, metric in report.metrics.items():
        error = f"{metric.standard_error:.4f}" if metric.standard_error is not None else ""
        cells = (f"{metric.value:.4f}", error, metric.unit, metric.protocol_id[:12])
        rows.append((f"{report.model}@{report.version} {name}", *cells))
        for kind in ("gaussian", "real"):
            if f"{kind}_{name}" in report.baselines:
                rows.append((f"{kind} {name}", f"{report.baselines[f'{kind}_{name}']:.4f}", "", metric.unit, ""))
    print(console.table(rows, ("result", "value", "standard error", "unit", "protocol id")))
