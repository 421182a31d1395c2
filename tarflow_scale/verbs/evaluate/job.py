"""An evaluation as a job: its parts, what protocols are bound to, and the measures that turn parts into numbers.

Parts are kept beside the reference's cache under names that say what decides them. A job that was killed finds what it
had made, and a part that is missing keeps any number from coming out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tarflow_scale import storage
from tarflow_scale.config.evaluate import EvaluateConfig
from tarflow_scale.config.protocols import (
    FrechetProtocol,
    InceptionScoreProtocol,
    KernelProtocol,
    LikelihoodProtocol,
    ManifoldProtocol,
    NatsProtocol,
    SampledProtocol,
    load_protocol,
)
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
from tarflow_scale.metrics.requirements import PartIdentity, plan
from tarflow_scale.pool import Pool
from tarflow_scale.records import FileRecord, ModelVersion
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console, provenance
from tarflow_scale.shards.manifest import read_manifest
from tarflow_scale.verbs.evaluate.worker import GRID_NAME, EvaluationUnit, Scorer

__all__ = ["Evaluation", "moments_of"]


class Evaluation:
    """The parts of an evaluation and what becomes of them.

    Args:
        config: of the verb.
        registry: of the version, or None for references alone.
        version: what is evaluated.

    Raises:
        UserError: protocols, data and references do not fit together.
    """

    def __init__(self, config: EvaluateConfig, registry: Registry | None, version: ModelVersion | None) -> None:
        self.config = config
        self.version = version
        self.protocols: dict[str, LikelihoodProtocol | SampledProtocol] = {
            path: load_protocol(path) for path in config.metrics.protocols
        }
        if version is None:
            self.protocols = {p: one for p, one in self.protocols.items() if not isinstance(one, LikelihoodProtocol)}
        self.data, self.reference = read_manifest(config.data.path), read_manifest(config.reference.path)
        _check_protocols(self)
        self.references = References(config.reference.cache)
        self.extractors = {
            path: weights_digest(one, config.metrics.extractor_weights) for path, one in self.sampled().items()
        }
        self.bound = {
            path: self.references.find(one, self.extractors[path], self.reference, again=version is None)
            for path, one in self.sampled().items()
        }
        self._whole = {
            path: one is not None and version is not None and self.references.is_whole(one)
            for path, one in self.bound.items()
        }
        gpu = config.cluster.gpus_per_worker > 0
        weights = None
        if version is not None and registry is not None:
            decoding = calibration_for(registry, version.version, config.sampling, gpu)
            weights = [
                version.weights_digest,
                config.sampling.model_dump(mode="json"),
                decoding.model_dump(mode="json") if decoding else None,
            ]
        facts = PartIdentity(
            device=["cuda" if gpu else config.cluster.cpus_per_worker, provenance.package_versions()["torch"]],
            weights=weights,
            test=self.data.digest,
            reference=self.reference.digest,
            folder=self.references.parts,
        )
        self.wanted = plan(
            self.protocols,
            self.extractors,
            self.data.num_images,
            self.reference.num_images,
            config.metrics.baselines and version is not None,
            facts,
        )

    def num_images(self, path: str) -> int:
        """Images that a protocol's number is about."""
        protocol = self.protocols[path]
        return self.data.num_images if isinstance(protocol, LikelihoodProtocol) else protocol.num_images

    def sampled(self) -> dict[str, SampledProtocol]:
        """The protocols that look at images through an extractor."""
        return {path: one for path, one in self.protocols.items() if not isinstance(one, LikelihoodProtocol)}

    def units(self) -> list[EvaluationUnit]:
        """Every part that is needed, each once."""
        found: dict[tuple[str, str], EvaluationUnit] = {}
        for path, wanted in self.wanted.items():
            work: list[tuple[Part, Any]] = [(part, self.protocols[path]) for part in wanted.bits]
            for features in wanted.sets():
                if features is wanted.samples and self.version is None:
                    continue
                if features is wanted.reference and self._whole[path] and features.reduced:
                    continue
                work += [(part, features) for part in features.parts()]
            for part, what in work:
                found.setdefault((part.folder, part.name), EvaluationUnit(part, what))
        return list(found.values())

    def make(self, pool: Pool, units: list[EvaluationUnit]) -> None:
        """Make the parts that are not there."""
        there = {folder: set(storage.list_names(folder)) for folder in {unit.part.folder for unit in units}}
        missing = [unit for unit in units if unit.part.name not in there[unit.part.folder]]
        total, left = (sum(unit.num_images for unit in several) for several in (units, missing))
        config = self.config
        arguments = {
            "registry": config.registry if self.version else None,
            "version": self.version.version if self.version else 0,
            "data": config.data,
            "reference": config.reference,
            "sampling": config.sampling,
            "extractor_weights": config.metrics.extractor_weights,
            "threads": config.cluster.cpus_per_worker,
            "gpu": config.cluster.gpus_per_worker > 0,
        }
        with console.progress_bar(total, "evaluate", initial=total - left) as bar:
            for unit, _ in pool.run(Scorer, arguments, missing):
                bar.update(unit.num_images)

    def bind(self) -> dict[str, Binding]:
        """What each sampled protocol with a reference is bound to; bound now where it was not."""
        found: dict[str, Binding] = {}
        for path, protocol in self.sampled().items():
            reference = self.wanted[path].reference
            if reference is None:
                continue
            binding = self.bound[path]
            if not self._whole[path] or binding is None:
                moments = None
                if reference.reduced:
                    moments = merged(moments_of(reference, layer_of(protocol)))
                digest, layer = images_digest(reference.hashes()), layer_of(protocol)
                extractor = self.extractors[path]
                binding = self.references.bind(protocol, extractor, self.reference, digest, moments, layer)
            found[path] = binding
        return found

    def measure(self, pool: Pool, bindings: Mapping[str, Binding]) -> dict[str, Measured]:
        """Numbers of all sampled protocols, by path."""
        measures = {path: self._measure(path, one, bindings.get(path)) for path, one in self.sampled().items()}
        threads = {"threads": self.config.cluster.cpus_per_worker}
        return in_rounds(measures, lambda tasks: pool.run(Reducer, threads, tasks))

    def grid(self, registry: Registry) -> FileRecord | None:
        """The picture of the first samples, stored; None where nothing was sampled."""
        for wanted in self.wanted.values():
            if wanted.samples is not None and storage.exists(wanted.samples.beside(GRID_NAME)):
                return registry.keep(storage.read_bytes(wanted.samples.beside(GRID_NAME)))
        return None

    def tidy(self) -> None:
        """Remove what was made for this version alone; references stay."""
        for wanted in self.wanted.values():
            folders = {part.folder for part in wanted.bits} | ({wanted.samples.folder} if wanted.samples else set())
            for folder in folders:
                storage.remove_tree(folder)

    def _measure(self, path: str, protocol: SampledProtocol, binding: Binding | None) -> Measure:
        wanted = self.wanted[path]
        assert wanted.samples is not None
        if isinstance(protocol, InceptionScoreProtocol):
            return inception_score(wanted.samples, protocol.num_splits, protocol.shuffle_seed)
        assert wanted.reference is not None
        assert binding is not None
        match protocol:
            case FrechetProtocol():
                location = self.references.moments_location(binding)
                return frechet(wanted.samples, protocol.layer, location, protocol.estimate == "infinity")
            case KernelProtocol():
                subsets = protocol.num_subsets, protocol.subset_size, protocol.subset_seed
                return kernel_distance(wanted.samples, wanted.reference, *subsets)
            case ManifoldProtocol():
                return manifold_share(protocol.metric, wanted.samples, wanted.reference, protocol.neighbours)


def moments_of(features: FeatureSet, layer: str) -> Iterator[Moments]:
    """Moments of each part, one at a time."""
    for part in features.parts():
        yield Moments.stored(part.location, layer)


def _check_protocols(job: Evaluation) -> None:
    """Refuse protocols that do not fit each other or the data, before any work."""
    names = [protocol.name for protocol in job.protocols.values()]
    if len(set(names)) < len(names):
        raise ConfigError(f"protocols of one evaluation must have different names (got {', '.join(names)}); drop one")
    for manifest in (job.data, job.reference):
        for protocol in job.protocols.values():
            if isinstance(protocol, NatsProtocol) != (manifest.vectors is not None):
                raise ConfigError(
                    f"protocol {protocol.name} is for {'vectors' if manifest.vectors is None else 'images'} (got "
                    f"{manifest.samples_in_words} in {manifest.name}/{manifest.split}); choose another protocol"
                )
            if not isinstance(protocol, NatsProtocol) and protocol.bit_depth != manifest.bit_depth:
                raise ConfigError(
                    f"protocol {protocol.name} is for {protocol.bit_depth}-bit data (got {manifest.bit_depth} in "
                    f"{manifest.name}/{manifest.split}); choose another protocol"
                )
    for protocol in job.protocols.values():
        if isinstance(protocol, KernelProtocol | ManifoldProtocol):
            there = job.reference.num_images
            if protocol.num_reference_images > there:
                raise ConfigError(
                    f"protocol {protocol.name} needs {protocol.num_reference_images} reference images (got {there} in "
                    f"{job.reference.name}/{job.reference.split}); use the data set that it is for"
                )
