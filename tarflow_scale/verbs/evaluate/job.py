"""The parts of an evaluation, the references of its protocols, and the measures that compute numbers from parts.

Parts are stored in the reference cache, in folders named by a digest of everything that determines their content. A job
that is run again reuses the parts that exist. Numbers are computed only when no part is missing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tarflow_scale import storage
from tarflow_scale.config.cluster import ClusterConfig
from tarflow_scale.config.data import DataSetConfig
from tarflow_scale.config.evaluate import MetricsConfig, ReferenceConfig
from tarflow_scale.config.protocols import (
    FrechetProtocol,
    InceptionScoreProtocol,
    KernelProtocol,
    ManifoldProtocol,
    PerImageProtocol,
    SampledProtocol,
    load_protocol,
)
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.loading import calibration_for
from tarflow_scale.metrics.features import layer_of, weights_digest
from tarflow_scale.metrics.frechet import Moments, frechet, merged
from tarflow_scale.metrics.inception_score import inception_score
from tarflow_scale.metrics.kernel import kernel_distance
from tarflow_scale.metrics.manifold import manifold_share
from tarflow_scale.metrics.measure import Measure, Measured, Reducer, in_rounds
from tarflow_scale.metrics.parts import FeatureSet, Part
from tarflow_scale.metrics.protocol_id import images_digest
from tarflow_scale.metrics.reference import Binding, References
from tarflow_scale.metrics.requirements import PartIdentity, requirements_of
from tarflow_scale.pool import Pool
from tarflow_scale.records import FileRecord, ModelVersion
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import provenance
from tarflow_scale.shards.manifest import read_manifest
from tarflow_scale.verbs.evaluate.worker import GRID_NAME, EvaluationUnit, Scorer

__all__ = ["Evaluation", "moments_of"]


class Evaluation:
    """The parts of an evaluation and the numbers that are computed from them.

    Args:
        metrics: the section ``metrics``.
        data: the split whose likelihood is measured.
        reference: the real images, and the cache of references and parts.
        sampling: the section ``sampling``.
        cluster: the section ``cluster``.
        registered: the registry and the version to evaluate; None to compute only references.

    Raises:
        UserError: protocols, data and references do not fit together.
    """

    def __init__(
        self,
        metrics: MetricsConfig,
        data: DataSetConfig,
        reference: ReferenceConfig,
        sampling: SamplingConfig,
        cluster: ClusterConfig,
        registered: tuple[Registry, ModelVersion] | None,
    ) -> None:
        self._gpu, self._threads = cluster.gpus_per_worker > 0, cluster.cpus_per_worker
        self._arguments = {
            "version": registered and (registered[0].path, registered[0].model, registered[1].version),
            "data": data,
            "reference": reference,
            "sampling": sampling,
            "extractor_weights": metrics.extractor_weights,
            "threads": self._threads,
            "gpu": self._gpu,
        }
        protocols = {path: load_protocol(path) for path in metrics.protocols}
        self._sampled: dict[str, SampledProtocol] = {
            path: protocol for path, protocol in protocols.items() if not isinstance(protocol, PerImageProtocol)
        }
        self.protocols = protocols if registered else {path: protocols[path] for path in self._sampled}
        self.data, self.reference = read_manifest(data.path), read_manifest(reference.path)
        _check_protocols(self)
        self.references = References(reference.cache)
        self.extractors: dict[str, str] = {}
        self._bound: dict[str, Binding] = {}
        for path, protocol in self._sampled.items():
            self.extractors[path] = extractor = weights_digest(protocol, metrics.extractor_weights)
            binding = self.references.find(protocol, extractor, self.reference, again=registered is None)
            if binding is not None and registered is not None and self.references.is_whole(binding):
                self._bound[path] = binding
        self._has_samples = registered is not None
        identity = PartIdentity(
            device=["cuda" if self._gpu else self._threads, provenance.package_versions()["torch"]],
            weights=registered and self._weights(*registered, sampling),
            test=self.data.digest,
            reference=self.reference.digest,
            folder=self.references.parts,
        )
        self.requirements = requirements_of(
            self.protocols,
            self.extractors,
            self.data.num_images,
            self.reference.num_images,
            metrics.baselines and self._has_samples,
            identity,
        )

    def _weights(self, registry: Registry, version: ModelVersion, sampling: SamplingConfig) -> list[Any]:
        """The digest of the weights and the settings: all that determines the samples, besides the seed."""
        plan = calibration_for(registry, version.version, sampling, self._gpu)
        return [version.weights_digest, sampling.model_dump(mode="json"), plan and plan.model_dump(mode="json")]

    def num_images(self, path: str) -> int:
        """Number of images that a protocol measures."""
        protocol = self.protocols[path]
        return self.data.num_images if isinstance(protocol, PerImageProtocol) else protocol.num_images

    def units(self) -> list[EvaluationUnit]:
        """List the parts that are needed, without duplicates."""
        units: dict[str, EvaluationUnit] = {}
        for path, requirement in self.requirements.items():
            work: list[tuple[Part, Any]] = [(part, self.protocols[path]) for part in requirement.likelihoods]
            for features in requirement.feature_sets():
                if features is requirement.samples and not self._has_samples:
                    continue
                if features is requirement.reference and path in self._bound and features.reduced:
                    continue
                work += [(part, features) for part in features.parts()]
            for part, purpose in work:
                units.setdefault(part.location, EvaluationUnit(part, purpose))
        return list(units.values())

    def make(self, pool: Pool, units: list[EvaluationUnit]) -> None:
        """Make the parts that are missing."""
        for _ in pool.run_missing(Scorer, self._arguments, units, EvaluationUnit.missing(units), "evaluate"):
            pass  # the results are the parts

    def bind(self) -> dict[str, Binding]:
        """Bind each protocol to its reference images, if it needs them and is not bound yet; return all bindings."""
        bindings = dict(self._bound)
        for path, protocol in self._sampled.items():
            reference, layer = self.requirements[path].reference, layer_of(protocol)
            if reference is not None and path not in bindings:
                moments = merged(moments_of(reference, layer)) if reference.reduced else None
                digest, extractor = images_digest(reference.hashes()), self.extractors[path]
                bindings[path] = self.references.bind(protocol, extractor, self.reference, digest, moments, layer)
        return bindings

    def measure(self, pool: Pool, bindings: Mapping[str, Binding]) -> dict[str, Measured]:
        """Compute the numbers of all protocols that need samples, by path of the protocol."""
        sampled = self._sampled.items()
        measures = {path: self._measure(path, protocol, bindings.get(path)) for path, protocol in sampled}
        return in_rounds(measures, lambda tasks: pool.run(Reducer, {"threads": self._threads}, tasks))

    def grid(self, registry: Registry) -> FileRecord | None:
        """Store the picture of the first samples in the registry; returns None if nothing was sampled."""
        for requirement in self.requirements.values():
            location = requirement.samples and requirement.samples.beside(GRID_NAME)
            if location is not None and storage.exists(location):
                return registry.keep(storage.read_bytes(location))
        return None

    def remove_parts(self) -> None:
        """Remove the parts of this version; the parts of references stay."""
        for requirement in self.requirements.values():
            folders = {part.folder for part in requirement.likelihoods}
            for folder in folders | ({requirement.samples.folder} if requirement.samples else set()):
                storage.remove_tree(folder)

    def _measure(self, path: str, protocol: SampledProtocol, binding: Binding | None) -> Measure:
        samples, reference = self.requirements[path].samples, self.requirements[path].reference
        assert samples is not None
        if isinstance(protocol, InceptionScoreProtocol):
            return inception_score(samples, protocol.num_splits, protocol.shuffle_seed)
        assert reference is not None
        assert binding is not None
        match protocol:
            case FrechetProtocol():
                location = self.references.moments_location(binding)
                return frechet(samples, protocol.layer, location, protocol.estimate == "infinity")
            case KernelProtocol():
                subsets = protocol.num_subsets, protocol.subset_size, protocol.subset_seed
                return kernel_distance(samples, reference, *subsets)
            case ManifoldProtocol():
                return manifold_share(protocol.metric, samples, reference, protocol.neighbours)


def moments_of(features: FeatureSet, layer: str) -> Iterator[Moments]:
    """Read the moments of each part, one part at a time."""
    for part in features.parts():
        yield Moments.stored(part.location, layer)


def _check_protocols(job: Evaluation) -> None:
    """Raise an error, before any work, if protocols do not fit each other or the data."""
    names = [protocol.name for protocol in job.protocols.values()]
    if len(set(names)) < len(names):
        raise ConfigError(f"protocols of one evaluation must have different names (got {', '.join(names)}); remove one")
    for manifest in (job.data, job.reference):
        for protocol in job.protocols.values():
            if protocol.events != manifest.event.kind:
                raise ConfigError(
                    f"protocol {protocol.name} is for {protocol.events} (got {manifest.event} in "
                    f"{manifest.name}/{manifest.split}); choose another protocol"
                )
    for protocol in job.protocols.values():
        if (
            isinstance(protocol, FrechetProtocol)
            and protocol.reconstructs
            and job.data.num_images < protocol.num_images
        ):
            raise ConfigError(
                f"protocol {protocol.name} needs {protocol.num_images} images to reconstruct (got "
                f"{job.data.num_images} in {job.data.name}/{job.data.split}); use the data set of the protocol"
            )
        if isinstance(protocol, KernelProtocol | ManifoldProtocol):
            num_images = job.reference.num_images
            if protocol.num_reference_images > num_images:
                raise ConfigError(
                    f"protocol {protocol.name} needs {protocol.num_reference_images} reference images (got "
                    f"{num_images} in {job.reference.name}/{job.reference.split}); use the data set of the protocol"
                )
