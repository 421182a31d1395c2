"""Autoencoders: shapes, posteriors, published weights, files, and one line for each mistake."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tarflow_scale.autoencoders.contract import Autoencoder, LatentGaussian
from tarflow_scale.autoencoders.stored import (
    autoencoder_files,
    autoencoder_from_files,
    build_autoencoder,
    digest_of,
    read_published,
    with_decoder,
)
from tarflow_scale.config.autoencoder import ConvolutionalConfig, TinyConfig
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.shards.images import resize_center_crop
from tests.conftest import SAMPLES

OWN = ConvolutionalConfig(factor=4, latent_channels=6, width=16, blocks=1)
needs_taef2 = pytest.mark.skipif(not (SAMPLES / "taef2_encoder.safetensors").exists(), reason="no weights of taef2")


def images(num: int = 2, size: int = 32, channels: int = 3) -> Tensor:
    return torch.rand((num, channels, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1


# -- posteriors --------------------------------------------------------------------------------------------------------


def test_a_posterior_has_torchs_density_and_divergence() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, log_var, noise = torch.randn((3, 2, 4, 3, 3), generator=generator, dtype=torch.float64)
    posterior = LatentGaussian(mean, log_var)
    normal = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    z = posterior.at(noise)
    assert torch.allclose(posterior.log_prob(z), normal.log_prob(z).flatten(1).sum(1))
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert torch.allclose(posterior.kl(), torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1))


def test_one_latent_has_no_density() -> None:
    posterior = LatentGaussian(torch.zeros(1, 2, 3, 3), None)
    assert posterior.at(torch.ones(1, 2, 3, 3)) is posterior.mean
    for use in (lambda: posterior.log_prob(posterior.mean), posterior.kl):
        with pytest.raises(ValueError, match="without a variance"):
            use()


# -- own autoencoders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "channels"), [(2, 1), (4, 3), (8, 3)])
@pytest.mark.parametrize("posterior", ["learned", "fixed"])
def test_an_own_autoencoder_has_the_shapes_of_its_factor(factor: int, channels: int, posterior: str) -> None:
    values = {"factor": factor, "num_channels": channels, "latent_channels": 5, "width": 8, "blocks": 1}
    autoencoder = build_autoencoder(ConvolutionalConfig.model_validate(values | {"posterior": posterior}))
    x = images(channels=channels)[..., :16]  # which is not square
    encoded = autoencoder.encode(x)
    shape = autoencoder.latent_shape((channels, 32, 16))
    assert encoded.mean.shape[1:] == shape == (5, 32 // factor, 16 // factor)
    assert autoencoder.decode(encoded.mean).shape == x.shape
    assert encoded.log_var is not None
    if posterior == "fixed":
        assert torch.allclose(encoded.log_var.exp().sqrt(), torch.tensor(0.5))


def test_every_weight_of_an_own_autoencoder_is_used() -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(OWN)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    encoded = autoencoder.encode(images())
    loss = autoencoder.decode(encoded.at(torch.randn_like(encoded.mean))).square().mean() + encoded.kl().mean()
    loss.backward()
    unused = [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert unused == ["log_scale"]  # of the likelihood


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"factor": 6, "latent_channels": 4}, r"factor must be a power of 2 \(got 6\)"),
        ({"factor": 4, "latent_channels": 4, "width": 12}, r"width must be a multiple of 8 \(got 12\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ConvolutionalConfig(**values)


def test_images_that_do_not_fit_are_refused() -> None:
    autoencoder = build_autoencoder(OWN)
    with pytest.raises(ValueError, match=r"3 channels \(got 1\)"):
        autoencoder.latent_shape((1, 8, 8))
    with pytest.raises(ValueError, match=r"multiples of the autoencoder's factor 4 \(got 8x6\)"):
        autoencoder.latent_shape((3, 8, 6))


# -- taef2 -------------------------------------------------------------------------------------------------------------


def published(weights: dict[str, Tensor], x: Tensor, encodes: bool) -> Tensor:
    """The published layers of taef2, written out again from their description."""

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride=stride, padding=1)

    def block(x: Tensor, name: str) -> Tensor:
        if f"{name}.pool.0.weight" in weights:
            inner = F.conv2d(x, weights[f"{name}.pool.0.weight"])
            inner = F.group_norm(inner, 4, weights[f"{name}.pool.1.weight"], weights[f"{name}.pool.1.bias"])
            x = x + F.conv2d(inner.relu(), weights[f"{name}.pool.3.weight"])
        inner = convolve(convolve(x, f"{name}.conv.0").relu(), f"{name}.conv.2").relu()
        return (convolve(inner, f"{name}.conv.4") + x).relu()

    if encodes:
        x = block(convolve(x, "0"), "1")
        for first in (2, 6, 10):
            x = convolve(x, str(first), stride=2)
            for place in range(first + 1, first + 4):
                x = block(x, str(place))
        return convolve(x, "14")
    x = convolve(3 * (x / 3).tanh(), "1").relu()
    for first in (3, 8, 13):
        for place in range(first, first + 3):
            x = block(x, str(place))
        x = convolve(x.repeat_interleave(2, 2).repeat_interleave(2, 3), str(first + 4))
    return convolve(block(x, "18"), "19")


def write_taef2(autoencoder: Autoencoder, folder: Path) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in autoencoder.state_dict().items():
        part, _, layer = name.partition(".")
        parts[part][layer] = tensor.contiguous()
    for part, tensors in parts.items():
        save_file(tensors, folder / f"taef2_{part}.safetensors")
    return parts


def test_the_layers_of_taef2_are_the_published_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = write_taef2(build_autoencoder(TinyConfig()), tmp_path)
    autoencoder = read_published(str(tmp_path))
    x = images()
    encoded = autoencoder.encode(x)
    assert encoded.log_var is None
    assert encoded.mean.shape == (2, 32, 4, 4)
    assert torch.allclose(encoded.mean, published(parts["encoder"], (x + 1) / 2, encodes=True), atol=1e-5)
    z = 4 * torch.randn(2, 32, 4, 4)
    assert torch.allclose(autoencoder.decode(z), 2 * published(parts["decoder"], z, encodes=False) - 1, atol=1e-5)


@needs_taef2
def test_taef2_reconstructs_photographs() -> None:
    """The figures of a direct run of the published layers, on the first four photographs of Kodak's set."""
    weights = {
        part: {name: tensor.float() for name, tensor in load_file(SAMPLES / f"taef2_{part}.safetensors").items()}
        for part in ("encoder", "decoder")
    }
    autoencoder = read_published(str(SAMPLES))
    with tarfile.open(SAMPLES / "kodak24_png.tar") as tar:
        for name in sorted(name for name in tar.getnames() if name.endswith(".png"))[:4]:
            file = tar.extractfile(name)
            assert file is not None
            picture = np.array(Image.open(io.BytesIO(file.read())).convert("RGB")).transpose(2, 0, 1)
            x = torch.from_numpy(resize_center_crop(picture, (256, 256)))[None] / 127.5 - 1
            direct = published(weights["decoder"], published(weights["encoder"], (x + 1) / 2, True), False)
            ours = autoencoder.decode(autoencoder.encode(x).mean)
            assert abs(psnr(ours, x) - psnr(2 * direct - 1, x)) < 0.01
            assert psnr(ours, x) > 24


def psnr(ours: Tensor, x: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images on [-1, 1]."""
    return float(-10 * torch.log10(((ours.clamp(-1, 1) - x) / 2).square().mean()))


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kl = pytest.importorskip("diffusers").AutoencoderKL
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    folder = tmp_path_factory.mktemp("kl")
    kl(block_out_channels=(16, 32), latent_channels=4, norm_num_groups=8, **blocks).save_pretrained(folder)
    return folder


def test_an_autoencoder_of_diffusers_gives_the_same_latents_and_images(diffusers_folder: Path) -> None:
    theirs = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(diffusers_folder)
    ours = read_published(str(diffusers_folder))
    x = images()
    with torch.no_grad():
        expected, encoded = theirs.encode(x).latent_dist, ours.encode(x)
        assert encoded.log_var is not None
        assert torch.equal(encoded.mean, expected.mean)
        assert torch.equal(encoded.log_var, expected.logvar)
        assert torch.allclose(ours.decode(encoded.mean), theirs.decode(expected.mean).sample, atol=1e-5)
    assert ours.latent_shape((3, 32, 32)) == tuple(encoded.mean.shape[1:])


def test_without_diffusers_one_line_says_what_to_install(
    diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"needs the package diffusers .*\[latents\]'"):
        read_published(str(diffusers_folder))


def test_another_class_of_diffusers_is_refused(diffusers_folder: Path, tmp_path: Path) -> None:
    for file in diffusers_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"_class_name": "AutoencoderDC"}))
    with pytest.raises(ConfigError, match=r"must be an AutoencoderKL \(got AutoencoderDC\)"):
        read_published(str(tmp_path))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [OWN, TinyConfig(latent_channels=4, width=8)], ids=lambda config: config.kind)
def test_files_give_the_same_autoencoder(config: ConvolutionalConfig | TinyConfig) -> None:
    autoencoder = build_autoencoder(config)
    files = autoencoder_files(autoencoder)
    again = autoencoder_from_files(files, "here")
    assert again.config == config
    assert not again.training
    assert all(
        torch.equal(a, b) for a, b in zip(autoencoder.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert digest_of(files) == digest_of(autoencoder_files(again))


@pytest.mark.parametrize("config", [OWN, TinyConfig(latent_channels=4, width=8)], ids=lambda config: config.kind)
def test_another_decoder_leaves_the_bytes_of_the_encoder_and_the_digest(
    config: ConvolutionalConfig | TinyConfig,
) -> None:
    """Also where weights are stored in half precision: an encoder that is written again in fp32 has other bytes."""
    autoencoder = build_autoencoder(config).half()
    files, parts = autoencoder_files(autoencoder), autoencoder.encoder_parts
    weights = {name: torch.randn(tensor.shape) for name, tensor in autoencoder.state_dict().items()}
    other = with_decoder(files, weights | {"latent_scale": torch.ones(4)})
    assert digest_of(other) == digest_of(files)
    before, after = (load(content["autoencoder.safetensors"]) for content in (files, other))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor if name.startswith(parts) else weights[name]
        assert after[name].dtype == expected.dtype
        assert torch.equal(after[name], expected)
    assert any(name.startswith(parts) for name in before)
    assert autoencoder_from_files(other, "here").config == config
    encoder = next(name for name in before if name.startswith(parts))
    changed = autoencoder_files(autoencoder, before | {encoder: before[encoder] + 1})
    assert digest_of(changed) != digest_of(files)
    renamed = files | {"autoencoder.json": files["autoencoder.json"].replace(b"4", b"5")}
    assert digest_of(renamed) != digest_of(files)


@pytest.mark.parametrize("fault", ["missing", "truncated", "not finite", "another shape", "not JSON"])
def test_damaged_files_are_refused(fault: str) -> None:
    autoencoder = build_autoencoder(OWN)
    if fault == "not finite":
        with torch.no_grad():
            next(autoencoder.parameters()).view(-1)[0] = torch.nan
    files = autoencoder_files(autoencoder)
    if fault == "missing":
        del files["autoencoder.safetensors"]
    if fault == "truncated":
        files["autoencoder.safetensors"] = files["autoencoder.safetensors"][:-7]
    if fault == "another shape":
        files["autoencoder.json"] = files["autoencoder.json"].replace(b'"width":16', b'"width":24')
    if fault == "not JSON":
        files["autoencoder.json"] = b"{"
    with pytest.raises(DataError, match="here does not hold an autoencoder"):
        autoencoder_from_files(files, "here")


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold an autoencoder"):
        read_published(str(tmp_path))
    write_taef2(build_autoencoder(TinyConfig()), tmp_path)
    (tmp_path / "taef2_decoder.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="is not a safetensors file"):
        read_published(str(tmp_path))
