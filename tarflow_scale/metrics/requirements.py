"""The feature sets and likelihoods that the protocols of an evaluation need, and the folders of their parts.

The name of a folder is a digest of everything that determines the numbers in it: weights, data, sampling, extractor,
layers, device and threads. Protocols with the same images and the same extractor share one pass over the images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tarflow_scale.config.protocols import FrechetProtocol, InceptionScoreProtocol, PerImageProtocol, SampledProtocol
from tarflow_scale.metrics.features import layer_of
from tarflow_scale.metrics.parts import FeatureSet, Images, Part, parts_of

__all__ = ["PartIdentity", "ProtocolInputs", "requirements_of"]


@dataclass(frozen=True)
class PartIdentity:
    """The inputs that determine the numbers in parts, except for the protocol and the extractor.

    device: kind of device, number of threads and version of torch. weights: digest of the model, and sampling settings;
    None if nothing is sampled. test, reference: digests of the manifests. folder: a function that returns the folder of
    parts for a key; the key contains everything that determines the parts.
    """

    device: Any
    weights: Any
    test: str
    reference: str
    folder: Callable[[Any], str]


@dataclass(frozen=True)
class ProtocolInputs:
    """The inputs that one protocol needs.

    samples: features of generated or reconstructed images. reference: features of the reference images. real: features
    of some real images, for the baseline. likelihoods: parts with the value of each sample of the split.
    """

    samples: FeatureSet | None = None
    reference: FeatureSet | None = None
    real: FeatureSet | None = None
    likelihoods: tuple[Part, ...] = ()

    def feature_sets(self) -> list[FeatureSet]:
        """The feature sets among the inputs."""
        return [features for features in (self.samples, self.reference, self.real) if features is not None]


def requirements_of(
    protocols: Mapping[str, PerImageProtocol | SampledProtocol],
    extractors: Mapping[str, str],
    num_test: int,
    num_reference: int,
    baselines: bool,
    identity: PartIdentity,
) -> dict[str, ProtocolInputs]:
    """The inputs that each protocol needs, by path of the protocol.

    Args:
        protocols: protocols by path.
        extractors: digests of extractors, by path of the protocol.
        num_test: number of images in the split on which likelihoods are measured.
        num_reference: number of images of the reference data set.
        baselines: whether real images are measured too.
        identity: everything else that determines the numbers.
    """
    requirements: dict[str, ProtocolInputs] = {}
    for path, protocol in protocols.items():
        if isinstance(protocol, PerImageProtocol):
            folder = identity.folder(["likelihoods", protocol.digest, identity.weights, identity.test, identity.device])
            requirements[path] = ProtocolInputs(likelihoods=tuple(parts_of(folder, num_test)))
        else:
            requirements[path] = _of_samples(protocol, extractors[path], num_reference, baselines)
    layers: dict[Any, set[str]] = {}
    for requirement in requirements.values():
        for features in requirement.feature_sets():
            layers.setdefault(_pass_of(features), set()).update(features.layers)

    def stored(features: FeatureSet | None) -> FeatureSet | None:
        """The feature set with its folder, and with all layers that any protocol needs from the same pass."""
        if features is None:
            return None
        images, layers_of_pass = features.images, tuple(sorted(layers[_pass_of(features)]))
        weights = identity.weights
        sources = {"sample": weights, "reconstruction": [weights, identity.test], "reference": identity.reference}
        size = images.num if images.kind == "reference" and images.seed is not None else None
        seen = [images.kind, images.seed, images.bit_depth, images.rounding, size]
        extractor = [features.extractor, features.extractor_digest, layers_of_pass, features.reduced]
        folder = identity.folder(["features", sources[images.kind], seen, extractor, identity.device])
        return replace(features, layers=layers_of_pass, folder=folder)

    return {
        path: replace(inputs, **{name: stored(getattr(inputs, name)) for name in ("samples", "reference", "real")})
        for path, inputs in requirements.items()
    }


def _pass_of(features: FeatureSet) -> Any:
    """A key that is equal for feature sets from the same pass over images, even with different numbers of samples."""
    images = features.images
    return (images if images.kind == "reference" else replace(images, num=0), features.extractor, features.reduced)


def _of_samples(protocol: SampledProtocol, extractor: str, num_reference: int, baselines: bool) -> ProtocolInputs:
    depth, rounding, seed = protocol.bit_depth, protocol.rounding, protocol.seed

    def features(images: Images, reduced: bool = False) -> FeatureSet:
        return FeatureSet(images, protocol.extractor, extractor, (layer_of(protocol),), "", reduced)

    def real(num: int) -> Images:
        return Images("reference", min(num, num_reference), None if num >= num_reference else seed, depth, rounding)

    samples = features(
        Images("reconstruction" if protocol.reconstructs else "sample", protocol.num_images, seed, depth, rounding)
    )
    if isinstance(protocol, InceptionScoreProtocol):
        return ProtocolInputs(samples)
    if isinstance(protocol, FrechetProtocol):
        has_baseline = baselines and protocol.estimate == "plain"
        baseline = features(real(protocol.num_images), reduced=True) if has_baseline else None
        return ProtocolInputs(samples, features(real(num_reference), reduced=True), baseline)
    return ProtocolInputs(samples, features(real(protocol.num_reference_images)))
