"""Images to features, through torch-fidelity's registry of extractors.

``pixels`` (ours) is the flattened image in levels 0..2^n-1; ``inception-v3-compat`` is torch-fidelity's port of the
TensorFlow Inception that FID is defined with; ``dinov2-vitl14`` is `tarflow_scale.metrics.dinov2`. Others come from
entry points of the group ``tarflow_scale.extractors``: subclasses of torch-fidelity's ``FeatureExtractorBase`` under
the name that a protocol uses. The weights file of an extractor is part of a protocol's id.
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
from tarflow_scale.metrics.dinov2 import DINOv2Extractor
from tarflow_scale.metrics.parts import FeatureSet

__all__ = ["Extractor", "PixelsExtractor", "layer_of", "open_extractor", "published_digest", "weights_digest"]

Extractor = Callable[[Tensor], dict[str, Tensor]]
"""Stored pixels ``(B, C, H, W)`` uint8 to features ``(B, D)`` fp32 of each layer, on the CPU."""

_GROUP = "tarflow_scale.extractors"
_INCEPTION = "inception-v3-compat"
_SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class _Weights:
    """A published weights file."""

    file: str
    """Its name, also in the torch hub cache."""
    source: str
    """Where to get it, in words."""
    prefix: str = ""
    """Of its SHA-256, as published; checked unless a protocol says more."""


_WEIGHTS = {
    _INCEPTION: _Weights(
        "weights-inception-2015-12-05-6726825d.pth", "torch-fidelity's release v0.2.0 on GitHub", "6726825d"
    ),
    "dinov2-vitl14": _Weights(
        "dinov2_vitl14_pretrain.pth", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/ (1,217,586,395 bytes)"
    ),
}


class PixelsExtractor(FeatureExtractorBase):
    """The flattened image in levels 0..2^bit_depth-1; feature layer ``levels-<bit_depth>``."""

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)
        self._bit_depth = int(features_list[0].rsplit("-", 1)[1])

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """One layer for every bit depth."""
        return tuple(f"levels-{bits}" for bits in range(1, 9))

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """8-bit levels, whatever the metric."""
        return "levels-8"

    @staticmethod
    def can_be_compiled() -> bool:
        """There is nothing to compile."""
        return False

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """``(B, C, H, W)`` uint8 to ``(B, C H W)`` fp32, which holds every level exactly."""
        return ((input >> (8 - self._bit_depth)).flatten(1).float(),)


def layer_of(protocol: SampledProtocol) -> str:
    """The layer that a protocol looks at: ``pool``, ``spatial`` or ``logits_unbiased``."""
    match protocol:
        case FrechetProtocol():
            return protocol.layer
        case InceptionScoreProtocol():
            return "logits_unbiased"
        case _:
            return "pool"


def weights_digest(protocol: SampledProtocol, weights: Mapping[str, str]) -> str:
    """SHA-256 of the extractor's weights file, checked; without such a file what stands for it.

    That is ``none`` for ``pixels`` and the version of the package that offers it for an entry point.

    Args:
        protocol: names the extractor and perhaps the digest it must have.
        weights: paths of weights files by name of the extractor; published ones may also be in the torch hub cache.

    Raises:
        ConfigError: no such extractor.
        DataError: no file, or another file than the protocol (or the published prefix) asks for.
    """
    return _checked_digest(protocol.extractor, weights, protocol.extractor_sha256 or "", protocol.name)


def published_digest(name: str, weights: Mapping[str, str]) -> str:
    """`weights_digest` of an extractor of which no protocol asks more than that it is the published one."""
    return _checked_digest(name, weights, "", name)


def _checked_digest(name: str, weights: Mapping[str, str], asked: str, whose: str) -> str:
    found = _found_digest(name, weights)
    expected = asked or (_WEIGHTS[name].prefix if name in _WEIGHTS else "")
    if not found.startswith(expected):
        place = _weights_path(name, weights) or name
        raise DataError(f"{place} is not the extractor of {whose} (sha256 {found}, not {expected}); replace it")
    return found


def _found_digest(name: str, weights: Mapping[str, str]) -> str:
    if name == "pixels":
        return "none"
    path = _weights_path(name, weights)
    if path is None:
        package = _entry_point(name).dist
        return f"{package.name} {package.version}" if package else name
    if not path.is_file():
        published = _WEIGHTS.get(name)
        get = f"download {published.file} from {published.source} and " if published else ""
        raise DataError(f"no weights of {name} at {path}; {get}set metrics.extractor_weights.{name} to the file")
    return storage.digest(path)


def _check_plain(path: Path) -> None:
    """See that a file holds tensors and nothing that runs: torch-fidelity unpickles its Inception's without asking.

    Raises:
        DataError: it holds something else.
    """
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes the reader raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as plain weights ({reason}); download it again") from error


def open_extractor(features: FeatureSet, weights: Mapping[str, str], device: torch.device) -> Extractor:
    """The extractor of a set of features, in evaluation mode.

    Args:
        features: what is wanted of which extractor.
        weights: see `weights_digest`.
        device: where it runs.

    Raises:
        DataError: no weights here, or others than where the set was planned.
    """
    name = features.extractor
    found = _found_digest(name, weights)
    if found != features.extractor_digest:
        raise DataError(
            f"weights of {name} differ between machines (sha256 {found} here, not {features.extractor_digest}); "
            f"copy the same file to all"
        )
    layers = features.layers
    names = _layer_names(name, layers, features.images.bit_depth)
    _register(name)
    path = _weights_path(name, weights)
    if name == _INCEPTION and path is not None:
        _check_plain(path)
    given = {} if path is None else {"feature_extractor_weights_path": str(path)}
    cuda = device.type == "cuda"
    wanted = sorted(set(names.values()) - {"spatial"}) or ["768"]  # a layer after the one that sFID looks at
    model = create_feature_extractor(name, wanted, cuda=cuda, verbose=False, **given)
    model = (_faster(model) if name == _INCEPTION else model).to(device)
    spatial: list[Tensor] = []
    if "spatial" in layers:
        model.Mixed_6d.branch1x1.register_forward_hook(lambda *arguments: spatial.append(arguments[2]))

    @torch.no_grad()
    def extract(images: Tensor) -> dict[str, Tensor]:
        rgb = images.expand(-1, 3, -1, -1) if name != "pixels" and images.shape[1] == 1 else images
        found = dict(zip(wanted, model(rgb.to(device)), strict=True))
        if spatial:
            found["spatial"] = spatial.pop()[:, :_SPATIAL_CHANNELS].flatten(1)
        return {layer: found[names[layer]].float().cpu() for layer in layers}

    return extract


def _faster(inception: Any) -> Any:
    """The same function in other arithmetic: batch norms folded into convolutions, channels last in memory.

    Features agree to 1e-6 of the largest; one and a half times as fast on a CPU (evals/benchmarks/evaluation.py).
    """
    blocks: list[Any] = [module for module in inception.modules() if isinstance(module, BasicConv2d)]
    for block in blocks:
        block.conv = torch.nn.utils.fuse_conv_bn_eval(block.conv, block.bn)
        block.bn = torch.nn.Identity()
    return inception.to(memory_format=torch.channels_last)


def _layer_names(name: str, layers: tuple[str, ...], bit_depth: int) -> dict[str, str]:
    """The extractor's own names of our layers."""
    if name == "pixels":
        return dict.fromkeys(layers, f"levels-{bit_depth}")
    if name == _INCEPTION:
        return {layer: "2048" if layer == "pool" else layer for layer in layers}
    return dict.fromkeys(layers, str(_extractor_class(name).get_default_feature_layer_for_metric("fid")))


def _register(name: str) -> None:
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, _extractor_class(name))


def _extractor_class(name: str) -> Any:
    own = {"pixels": PixelsExtractor, "dinov2-vitl14": DINOv2Extractor}
    return own[name] if name in own else _entry_point(name).load()


def _entry_point(name: str) -> metadata.EntryPoint:
    found = [point for point in metadata.entry_points(group=_GROUP) if point.name == name]
    if not found:
        offered = sorted({"pixels", *_WEIGHTS} | {point.name for point in metadata.entry_points(group=_GROUP)})
        raise ConfigError(f"no extractor {name!r} (there are {', '.join(offered)}); install the package that has it")
    return found[0]


def _weights_path(name: str, weights: Mapping[str, str]) -> Path | None:
    if name in weights:
        return Path(weights[name]).expanduser()
    return Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS[name].file if name in _WEIGHTS else None
