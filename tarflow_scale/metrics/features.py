"""Compute features of images with extractors from torch-fidelity's registry.

Extractor ``pixels`` flattens the image to levels 0..2^n-1; ``inception-v3-compat`` is torch-fidelity's port of the
TensorFlow Inception that defines FID; ``dinov2-vitl14`` is `tarflow_scale.metrics.dinov2`. Other packages can add
extractors (subclasses of torch-fidelity's ``FeatureExtractorBase``) as entry points of the group
``tarflow_scale.extractors``; a protocol gives the name of the entry point. The digest of the weights is part of a
protocol id.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from tarflow_scale import storage
from tarflow_scale.config.protocols import FrechetProtocol, InceptionScoreProtocol, SampledProtocol
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.flows.weights import read_plain_weights
from tarflow_scale.metrics.dinov2 import DINOv2Extractor
from tarflow_scale.metrics.parts import FeatureSet

__all__ = ["Extractor", "PixelsExtractor", "layer_of", "open_extractor", "published_digest", "weights_digest"]

Extractor = Callable[[Tensor], dict[str, Tensor]]
"""Maps stored pixels ``(B, C, H, W)`` uint8 to features by layer, each ``(B, D)`` fp32 on the CPU."""

_GROUP = "tarflow_scale.extractors"
_INCEPTION = "inception-v3-compat"
_SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class _Weights:
    """A published weights file."""

    file: str
    """Name of the file; the torch hub cache uses the same name."""
    source: str
    """Address of the download, for error messages."""
    prefix: str = ""
    """Published prefix of the SHA-256; checked if the protocol does not give the digest."""


_WEIGHTS = {
    _INCEPTION: _Weights(
        "weights-inception-2015-12-05-6726825d.pth", "torch-fidelity's release v0.2.0 on GitHub", "6726825d"
    ),
    "dinov2-vitl14": _Weights(
        "dinov2_vitl14_pretrain.pth", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/ (1,217,586,395 bytes)"
    ),
}


class PixelsExtractor(FeatureExtractorBase):
    """Flattens images to levels 0..2^bit_depth-1; the name of the feature layer is ``levels-<bit_depth>``."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self._bit_depth = int(features_list[0].rsplit("-", 1)[1])

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the feature layers, one for every bit depth."""
        return tuple(f"levels-{bits}" for bits in range(1, 9))

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The default feature layer: 8-bit levels, for every metric."""
        return "levels-8"

    @staticmethod
    def can_be_compiled() -> bool:
        """False, because there is nothing to compile."""
        return False

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """Map images ``(B, C, H, W)`` uint8 to levels ``(B, C H W)`` in fp32, which is exact."""
        return ((input >> (8 - self._bit_depth)).flatten(1).float(),)


def layer_of(protocol: SampledProtocol) -> str:
    """The layer that a protocol uses: ``pool``, ``spatial`` or ``logits_unbiased``."""
    match protocol:
        case FrechetProtocol():
            return protocol.layer
        case InceptionScoreProtocol():
            return "logits_unbiased"
        case _:
            return "pool"


def weights_digest(protocol: SampledProtocol, weights: Mapping[str, str]) -> str:
    """SHA-256 of the weights file of an extractor, checked against the digest that the protocol requires.

    If the extractor has no weights file, returns ``none`` for ``pixels``, and the name and version of the package for
    an extractor from an entry point.

    Args:
        protocol: gives the name of the extractor, and optionally the required digest of its weights.
        weights: paths of weights files by name of the extractor; published files may also be in the torch hub cache.

    Raises:
        ConfigError: the extractor does not exist.
        DataError: the file is missing, or its digest differs from the required digest or from the published prefix.
    """
    return _checked_digest(protocol.extractor, weights, protocol.extractor_sha256 or "", protocol.name)


def published_digest(name: str, weights: Mapping[str, str]) -> str:
    """Like `weights_digest`, but checks the digest only against its published prefix."""
    return _checked_digest(name, weights, "", name)


def _checked_digest(name: str, weights: Mapping[str, str], required: str, user: str) -> str:
    digest = _digest(name, weights)
    expected = required or (_WEIGHTS[name].prefix if name in _WEIGHTS else "")
    if not digest.startswith(expected):
        place = _weights_path(name, weights) or name
        raise DataError(f"{place} does not match the extractor of {user} (sha256 {digest}, not {expected}); replace it")
    return digest


def _digest(name: str, weights: Mapping[str, str]) -> str:
    if name == "pixels":
        return "none"
    path = _weights_path(name, weights)
    if path is None:
        package = _entry_point(name).dist
        return f"{package.name} {package.version}" if package else name
    if not path.is_file():
        published = _WEIGHTS.get(name)
        get = f"download {published.file} from {published.source} and " if published else ""
        raise DataError(
            f"weights of {name} are missing at {path}; {get}set metrics.extractor_weights.{name} to the file"
        )
    return storage.digest(path)


def open_extractor(features: FeatureSet, weights: Mapping[str, str], device: torch.device) -> Extractor:
    """Open the extractor of a feature set, in evaluation mode.

    Args:
        features: gives the name of the extractor, its digest and the layers.
        weights: see `weights_digest`.
        device: device of the extractor.

    Raises:
        DataError: the weights are missing on this machine, or differ from the weights on the driver.
    """
    name = features.extractor
    digest = _digest(name, weights)
    if digest != features.extractor_digest:
        raise DataError(
            f"weights of {name} differ between machines (sha256 {digest} here, not {features.extractor_digest}); "
            f"copy the same file to all machines"
        )
    layers = features.layers
    names = _layer_names(name, layers, features.images.bit_depth)
    _register(name)
    path = _weights_path(name, weights)
    if name == _INCEPTION and path is not None:
        read_plain_weights(path, str(path))  # refuses code, which torch-fidelity would run when it unpickles the file
    options = {} if path is None else {"feature_extractor_weights_path": str(path)}
    cuda = device.type == "cuda"
    wanted = sorted(set(names.values()) - {"spatial"}) or ["768"]  # any layer after the layer of sFID
    model = create_feature_extractor(name, wanted, cuda=cuda, verbose=False, **options)
    model = (_faster(model) if name == _INCEPTION else model).to(device)
    spatial: list[Tensor] = []
    if "spatial" in layers:
        model.Mixed_6d.branch1x1.register_forward_hook(lambda *arguments: spatial.append(arguments[2]))

    @torch.no_grad()
    def extract(images: Tensor) -> dict[str, Tensor]:
        rgb = images.expand(-1, 3, -1, -1) if name != "pixels" and images.shape[1] == 1 else images
        outputs = dict(zip(wanted, model(rgb.to(device)), strict=True))
        if spatial:
            outputs["spatial"] = spatial.pop()[:, :_SPATIAL_CHANNELS].flatten(1)
        return {layer: outputs[names[layer]].float().cpu() for layer in layers}

    return extract


def _faster(inception: Any) -> Any:
    """Make Inception faster: fold batch norms into convolutions, and store tensors with channels last.

    It is then 1.5 times as fast on a CPU (evals/benchmarks/evaluation.py). Features change by up to 1e-6 of the largest
    value.
    """
    blocks: list[Any] = [module for module in inception.modules() if isinstance(module, BasicConv2d)]
    for block in blocks:
        block.conv = torch.nn.utils.fuse_conv_bn_eval(block.conv, block.bn)
        block.bn = torch.nn.Identity()
    return inception.to(memory_format=torch.channels_last)


def _layer_names(name: str, layers: tuple[str, ...], bit_depth: int) -> dict[str, str]:
    """Map each layer of a feature set to the name that the extractor uses for it."""
    if name == "pixels":
        return dict.fromkeys(layers, f"levels-{bit_depth}")
    if name == _INCEPTION:
        return {layer: "2048" if layer == "pool" else layer for layer in layers}
    return dict.fromkeys(layers, str(_extractor_class(name).get_default_feature_layer_for_metric("fid")))


def _register(name: str) -> None:
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, _extractor_class(name))


def _extractor_class(name: str) -> Any:
    builtin = {"pixels": PixelsExtractor, "dinov2-vitl14": DINOv2Extractor}
    return builtin[name] if name in builtin else _entry_point(name).load()


def _entry_point(name: str) -> metadata.EntryPoint:
    points = {point.name: point for point in metadata.entry_points(group=_GROUP)}
    if name not in points:
        offered = sorted({"pixels", *_WEIGHTS, *points})
        raise ConfigError(
            f"unknown extractor {name!r} (known: {', '.join(offered)}); install the package that provides it"
        )
    return points[name]


def _weights_path(name: str, weights: Mapping[str, str]) -> Path | None:
    if name in weights:
        return Path(weights[name]).expanduser()
    return Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS[name].file if name in _WEIGHTS else None
