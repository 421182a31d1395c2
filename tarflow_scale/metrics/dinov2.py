"""DINOv2 ViT-L/14 as in published FD-DINOv2: PIL's bicubic resize to 224, ImageNet normalization, class token.

Features are the same as in dgm-eval (Stein et al., arXiv 2306.04675) and in the exact mode of edm2. torch-fidelity's
DINOv2 resizes as TensorFlow does, and cannot read a local file. The transformer comes from timm (extra ``dinov2``). The
position embedding is resampled from the trained grid of 37 x 37 to 16 x 16 as in the published code, not as in timm.
"""

import importlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from tarflow_scale.errors import ConfigError, DataError, needs_package

__all__ = ["DINOv2Extractor"]

_SIZE, _GRID = 224, 16
_INTERPOLATION_OFFSET = 0.1
"""Offset that the published code adds to the target size of the interpolation; it shifts sample points slightly."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2Extractor(FeatureExtractorBase):
    """Extracts the class token ``(B, 1024)`` after the last norm, as feature layer ``dinov2``.

    Args:
        name: name of the extractor.
        features_list: ``["dinov2"]``.
        feature_extractor_weights_path: the published ``dinov2_vitl14_pretrain.pth``.

    Raises:
        ConfigError: timm is not installed.
        DataError: the file does not hold weights of this model.
    """

    model_name = "vit_large_patch14_dinov2"
    """Name of the model in timm."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise ConfigError(needs_package(f"extractor {name}", "timm", "dinov2")) from error
        self.model = timm.create_model(self.model_name, pretrained=False, img_size=_SIZE, num_classes=0)
        try:
            state = torch.load(feature_extractor_weights_path, map_location="cpu", weights_only=True)
            state.pop("mask_token", None)  # used only in training
            state["pos_embed"] = _resampled(state["pos_embed"])
            self.model.load_state_dict(state)
        except Exception as error:
            raise DataError(
                f"{feature_extractor_weights_path} does not contain the weights of {name} ({error}); download the file "
                f"again"
            ) from error
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the feature layers."""
        return ("dinov2",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """The default feature layer, which is the same for every metric."""
        return "dinov2"

    @staticmethod
    def can_be_compiled() -> bool:
        """False, because torch cannot compile PIL's resize."""
        return False

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """Map images ``(B, 3, H, W)`` uint8 to features ``(B, 1024)`` fp32."""
        pictures = (Image.fromarray(pixels) for pixels in input.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        resized = np.stack([np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)) for image in pictures])
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        return (self.model(x.to(next(self.parameters()).device)).float(),)


def _resampled(position: Tensor) -> Tensor:
    """Resample the position embedding ``(1, 1 + 37 x 37, C)`` to ``(1, 1 + 16 x 16, C)``; the class token is first."""
    token, grid = position[:, :1], position[:, 1:]
    side = math.isqrt(grid.shape[1])
    scale = (_GRID + _INTERPOLATION_OFFSET) / side
    square = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    small = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, small.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
