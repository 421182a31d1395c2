"""Images to features, through torch-fidelity's registry of extractors.

``pixels`` (ours) is the flattened image in levels 0..2^n-1; ``inception-v3-compat`` is torch-fidelity's port of the
TensorFlow Inception that FID is defined with. The weights file of an extractor is part of a protocol's id.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from tarflow_scale import storage
from tarflow_scale.config import FrechetProtocol
from tarflow_scale.errors import DataError

__all__ = ["Extractor", "PixelsExtractor", "open_extractor", "weights_digest"]

Extractor = Callable[[Tensor], Tensor]
"""Stored pixels ``(B, C, H, W)`` uint8 to features ``(B, D)`` float64."""

_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_PREFIX = "6726825d"
_INCEPTION_LAYER = "2048"


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
        """``(B, C, H, W)`` uint8 to ``(B, C H W)`` float64."""
        return ((input >> (8 - self._bit_depth)).flatten(1).double(),)


def weights_digest(protocol: FrechetProtocol, weights: str | None) -> str:
    """SHA-256 of the extractor's weights file, checked; ``none`` for an extractor without weights.

    Args:
        protocol: names the extractor and perhaps the digest it must have.
        weights: path of the file, or None for the torch hub cache.

    Raises:
        DataError: no file, or another file than the protocol (or the published prefix) asks for.
    """
    if protocol.extractor == "pixels":
        return "none"
    path = _weights_path(weights)
    if not path.is_file():
        raise DataError(
            f"no Inception weights at {path}; download {_INCEPTION_FILE} from torch-fidelity's release v0.2.0 and set "
            f"metrics.extractor_weights to it"
        )
    found = storage.digest(path)
    expected = protocol.extractor_sha256 or _INCEPTION_PREFIX
    if not found.startswith(expected):
        raise DataError(f"{path} is not the extractor of {protocol.name} (sha256 {found}, not {expected}); replace it")
    return found


def open_extractor(protocol: FrechetProtocol, weights: str | None, device: torch.device) -> Extractor:
    """The extractor of a protocol, in evaluation mode.

    Raises:
        DataError: see `weights_digest`.
    """
    weights_digest(protocol, weights)
    if protocol.extractor == "pixels":
        if "pixels" not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor("pixels", PixelsExtractor)
        model = create_feature_extractor("pixels", [f"levels-{protocol.bit_depth}"], cuda=False, verbose=False)
    else:
        path = str(_weights_path(weights))
        model = create_feature_extractor(
            protocol.extractor,
            [_INCEPTION_LAYER],
            cuda=device.type == "cuda",
            verbose=False,
            feature_extractor_weights_path=path,
        )
    model = model.to(device)

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1) if protocol.extractor != "pixels" and images.shape[1] == 1 else images
        return model(rgb.to(device))[0].double().cpu()

    return extract


def _weights_path(weights: str | None) -> Path:
    return Path(weights).expanduser() if weights else Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
