"""DINOv2's features equal those of the published code, for random weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tarflow_scale import storage
from tarflow_scale.config.protocols import FrechetProtocol
from tarflow_scale.errors import DataError
from tarflow_scale.metrics.dinov2 import DINOv2Extractor
from tarflow_scale.metrics.features import open_extractor, weights_digest
from tarflow_scale.metrics.parts import FeatureSet, Images

NAME = "dinov2-vitl14"
PUBLISHED = torch.tensor(
    [
        [-0.18456699, 0.15397121, -0.60601151, 2.31184244, -0.41883022, -0.95877790],
        [0.47059280, 0.21123923, -1.19063962, 1.86625123, 0.06823863, -0.81901091],
    ]
)
"""First numbers of facebookresearch/dinov2's ``dinov2_vits14`` for `weights` and `pictures`, resized by torchvision as
dgm-eval does it; two pictures differ by up to 1.7."""


def weights(path: Path) -> Path:
    """Weights of a ViT-S/14 in the trained form, with a grid of 37 x 37, under the published names."""
    c, shapes = 384, dict[str, tuple[int, ...]]()
    shapes |= {"cls_token": (1, 1, c), "mask_token": (1, c), "pos_embed": (1, 1 + 37 * 37, c)}
    shapes |= {"patch_embed.proj.weight": (c, 3, 14, 14), "patch_embed.proj.bias": (c,)}
    shapes |= {"norm.weight": (c,), "norm.bias": (c,)}
    layers = {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (4 * c, c), "mlp.fc2": (c, 4 * c)}
    for block in (f"blocks.{i}" for i in range(12)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (c,), f"{block}.{norm}.bias": (c,)}
        shapes |= {f"{block}.ls1.gamma": (c,), f"{block}.ls2.gamma": (c,)}
        for name, (outputs, inputs) in layers.items():
            shapes |= {f"{block}.{name}.weight": (outputs, inputs), f"{block}.{name}.bias": (outputs,)}
    generator, state = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name in sorted(shapes):
        noise = torch.randn(shapes[name], generator=generator)
        if name.endswith(("gamma", "norm1.weight", "norm2.weight")) or name == "norm.weight":
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = noise * (noise.shape[-1] ** -0.5 if noise.dim() > 1 else 0.1)
    torch.save(state, path)
    return path


def pictures() -> torch.Tensor:
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return (F.interpolate(coarse, size=40, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def wanted(digest: str) -> FeatureSet:
    return FeatureSet(Images("sample", 2, 0, 8, "nearest"), NAME, digest, ("pool",), "")


def test_features_are_those_of_the_published_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(DINOv2Extractor, "model_name", "vit_small_patch14_dinov2")
    path = weights(tmp_path / "weights.pth")
    protocol = FrechetProtocol(name="x", metric="frechet", extractor=NAME, num_images=2, bit_depth=8)
    digest = weights_digest(protocol, {NAME: str(path)})
    assert digest == storage.digest(path)
    found = open_extractor(wanted(digest), {NAME: str(path)}, torch.device("cpu"))(pictures())["pool"]
    assert found.shape == (2, 384)
    torch.testing.assert_close(found[:, :6], PUBLISHED, atol=1e-4, rtol=0)


def test_weights_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    protocol = FrechetProtocol(name="x", metric="frechet", extractor=NAME, num_images=2, bit_depth=8)
    with pytest.raises(
        DataError, match=rf"weights of {NAME} are missing at .*; download dinov2_vitl14_pretrain.pth from https"
    ):
        weights_digest(protocol, {})
    monkeypatch.setattr(DINOv2Extractor, "model_name", "vit_small_patch14_dinov2")
    for content in (b"none", weights(tmp_path / "whole.pth").read_bytes()[:5000]):
        path = tmp_path / "weights.pth"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"weights.pth does not contain the weights of {NAME} \("):
            open_extractor(wanted(storage.digest(path)), {NAME: str(path)}, torch.device("cpu"))
