"""What an evaluation has to make: the sets of features that its protocols share, and where their parts are kept.

A set lies in a folder named by a digest of all that decides its numbers: weights, data, sampling, extractor, layers,
device and threads. Two protocols that look at the same images through the same extractor share one pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tarflow_scale.config.protocols import FrechetProtocol, InceptionScoreProtocol, LikelihoodProtocol, SampledProtocol
from tarflow_scale.metrics.features import layer_of
from tarflow_scale.metrics.parts import FeatureSet, Images, Part, parts_of

__all__ = ["PartIdentity", "Wanted", "plan"]


@dataclass(frozen=True)
class PartIdentity:
    """What decides the numbers of parts.

    device: threads and kind of device. weights: of the model and how it is sampled; None where nothing is sampled.
    test, reference: digests of manifests. folder: from facts to a folder.
    """

    device: Any
    weights: Any
    test: str
    reference: str
    folder: Callable[[Any], str]


@dataclass(frozen=True)
class Wanted:
    """What one protocol needs.

    samples, reference, real: features of generated images, of what they are compared with, and for a baseline of
    some real ones. bits: parts of log-likelihoods.
    """

    samples: FeatureSet | None = None
    reference: FeatureSet | None = None
    real: FeatureSet | None = None
    bits: tuple[Part, ...] = ()

    def sets(self) -> list[FeatureSet]:
        """Those that are wanted."""
        return [one for one in (self.samples, self.reference, self.real) if one is not None]


def plan(
    protocols: Mapping[str, LikelihoodProtocol | SampledProtocol],
    extractors: Mapping[str, str],
    num_test: int,
    num_reference: int,
    baselines: bool,
    facts: PartIdentity,
) -> dict[str, Wanted]:
    """What each protocol needs, by the path of its file.

    Args:
        protocols: by path.
        extractors: digests of extractors, by path of the protocol.
        num_test: images of the split whose likelihood is measured.
        num_reference: images of the reference data set.
        baselines: whether real images are measured too.
        facts: see there.
    """
    wanted: dict[str, Wanted] = {}
    for path, protocol in protocols.items():
        if isinstance(protocol, LikelihoodProtocol):
            folder = facts.folder(["bits", protocol.digest, facts.weights, facts.test, facts.device])
            wanted[path] = Wanted(bits=tuple(parts_of(folder, num_test)))
        else:
            wanted[path] = _of_samples(protocol, extractors[path], num_reference, baselines)
    layers: dict[Any, set[str]] = {}
    for one in wanted.values():
        for features in one.sets():
            layers.setdefault(_key(features), set()).update(features.layers)

    def placed(features: FeatureSet | None) -> FeatureSet | None:
        if features is None:
            return None
        whole = replace(features, layers=tuple(sorted(layers[_key(features)])))
        images = whole.images
        source = facts.weights if images.kind == "sample" else facts.reference
        size = images.num if images.kind == "reference" and images.seed is not None else None
        seen = [images.kind, images.seed, images.bit_depth, images.rounding, size]
        extractor = [whole.extractor, whole.extractor_digest, whole.layers, whole.reduced]
        return replace(whole, folder=facts.folder(["features", source, seen, extractor, facts.device]))

    return {
        path: replace(one, samples=placed(one.samples), reference=placed(one.reference), real=placed(one.real))
        for path, one in wanted.items()
    }


def _key(features: FeatureSet) -> Any:
    """Sets that one pass can make, but for the number of samples."""
    images = features.images
    return (replace(images, num=0) if images.kind == "sample" else images, features.extractor, features.reduced)


def _of_samples(protocol: SampledProtocol, extractor: str, num_reference: int, baselines: bool) -> Wanted:
    depth, rounding, seed = protocol.bit_depth, protocol.rounding, protocol.seed

    def features(images: Images, reduced: bool = False) -> FeatureSet:
        return FeatureSet(images, protocol.extractor, extractor, (layer_of(protocol),), "", reduced)

    def real(num: int) -> Images:
        every = num >= num_reference
        return Images("reference", min(num, num_reference), None if every else seed, depth, rounding)

    samples = features(Images("sample", protocol.num_images, seed, depth, rounding))
    if isinstance(protocol, InceptionScoreProtocol):
        return Wanted(samples)
    if isinstance(protocol, FrechetProtocol):
        few = features(real(protocol.num_images), reduced=True) if baselines and protocol.estimate == "plain" else None
        return Wanted(samples, features(real(num_reference), reduced=True), few)
    return Wanted(samples, features(real(protocol.num_reference_images)))
