"""Evaluation of autoencoders: the numbers are those of a second computation, and mistakes are one line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_scale import cli
from tarflow_scale.autoencoders.similarity import psnr, ssim
from tarflow_scale.autoencoders.stored import autoencoder_files, build_autoencoder
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.loading import load_autoencoder
from tarflow_scale.metrics.frechet import Moments, frechet_distance
from tarflow_scale.records import PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.reader import ShardSet
from tests.conftest import Trained, refused

PROTOCOLS = {
    "psnr": "metric: psnr\nbit_depth: 8\n",
    "ssim": "metric: ssim\nbit_depth: 8\n",
    "rfd": "metric: frechet\nimages: reconstructed\nextractor: pixels\nnum_images: 30\nbit_depth: 8\n"
    "rounding: nearest\n",
    "fd": "metric: frechet\nextractor: pixels\nnum_images: 30\nbit_depth: 8\nrounding: nearest\n",
    "four": "metric: psnr\nbit_depth: 4\n",
    "many": "metric: frechet\nimages: reconstructed\nextractor: pixels\nnum_images: 90\nbit_depth: 8\n",
}


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth images 3x12x12, 150 to train and 40 to test, an autoencoder, and the protocols."""
    path = tmp_path_factory.mktemp("evaluated")
    rng = np.random.default_rng(0)
    for split, num in (("train", 150), ("test", 40)):
        (path / "images" / split).mkdir(parents=True)
        for number in range(num):
            slopes = rng.uniform(-9, 9, (3, 2, 1, 1))
            rows = np.arange(12)
            ramp = 128 + slopes[:, 0] * (rows[:, None] - 6) + slopes[:, 1] * (rows[None, :] - 6)
            (path / f"images/{split}/{number}.png").write_bytes(encode_png(ramp.clip(0, 255).astype(np.uint8)))
    source = ["source.kind=folder", f"source.path={path}/images", f"shards.path={path}/data"]
    assert cli.main(["prepare", *source]) == 0
    torch.manual_seed(0)
    config = ConvolutionalConfig(factor=2, latent_channels=8, width=8, blocks=1)
    files = autoencoder_files(build_autoencoder(config))
    pixels = PixelFormat(bit_depth=8, noise="none").model_dump(mode="json")
    known = {"parameters": 1, "images_seen": None, "ema_half_life_images": None, "config_digest": "0" * 64}
    fields = known | {"git_commit": "none", "packages": {}, "pixels": pixels, "data": None}
    Registry(f"{path}/registry", "ae").register(files, fields, "test")
    for name, text in PROTOCOLS.items():
        (path / f"{name}.yaml").write_text(f"name: {name}\n{text}")
    return path


def evaluate(top: Path, *names: str) -> list[str]:
    protocols = ",".join(f"{top}/{name}.yaml" for name in names)
    data = [f"data.path={top}/data/test", f"reference.path={top}/data/train", f"reference.cache={top}/cache"]
    version = [f"registry.path={top}/registry", "registry.model=ae", "cluster.executor=local"]
    return ["evaluate", *version, *data, f"metrics.protocols=[{protocols}]"]


def test_the_numbers_are_those_of_the_reconstructions(top: Path) -> None:
    assert cli.main(evaluate(top, "psnr", "ssim", "rfd")) == 0
    report = Registry(f"{top}/registry", "ae").state().reports[1][-1]
    autoencoder, _ = load_autoencoder(f"{top}/registry", "ae", 1)
    images, reals = (ShardSet(f"{top}/data/{split}") for split in ("test", "train"))
    levels = torch.from_numpy(np.ascontiguousarray(images.take(np.arange(40)).events))
    x = levels.double() / 127.5 - 1
    with torch.no_grad():
        decoded = autoencoder.decode(autoencoder.encode(x.float()).mean)
    stored = (127.5 * (decoded.clamp(-1, 1) + 1)).round()
    again = stored.double() / 127.5 - 1
    for name, values in (("psnr", psnr(x, again)), ("ssim", ssim(x, again))):
        metric = report.metrics[name]
        assert metric.value == pytest.approx(float(values.mean()), abs=1e-3)
        assert metric.standard_error == pytest.approx(float(values.std()) / np.sqrt(40), abs=1e-3)
        assert metric.num_images == 40
        assert metric.per_image is not None
    real = torch.from_numpy(np.ascontiguousarray(reals.take(np.arange(150)).events)).flatten(1)
    distance = frechet_distance(Moments.of(stored[:30].flatten(1)), Moments.of(real))
    assert report.metrics["rfd"].value == pytest.approx(distance, rel=1e-3)
    assert [report.metrics[name].unit for name in ("psnr", "ssim", "rfd")] == [
        "dB", "SSIM", "levels of 8 bits, squared, reconstructions",
    ]  # fmt: skip
    assert report.baselines["real_rfd"] < report.metrics["rfd"].value
    assert "gaussian_rfd" not in report.baselines
    assert len({metric.protocol_id for metric in report.metrics.values()}) == 3


def test_mistakes_are_one_line(top: Path, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, evaluate(top, "fd"), "protocol fd measures a flow (got an autoencoder)")
    refused(capsys, evaluate(top, "four"), "protocol four is for 4-bit images (got 3x12x12 images, 8 bit")
    refused(capsys, evaluate(top, "many"), "needs 90 images to reconstruct (got 40 in")
    digits = [f"data.path={trained.data}/test", f"reference.path={trained.data}/train"]
    refused(capsys, [*evaluate(top, "four"), *digits], "must have the autoencoder's 3 channels (got 1)")
    flow = [f"registry.path={trained.registry}", "registry.model=small"]
    refused(capsys, [*evaluate(top, "four"), *digits, *flow], "protocol four measures an autoencoder (got a flow)")


def test_ssim_needs_its_window(top: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        image = np.full((3, 8, 8), 10 * number, np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.png").write_bytes(encode_png(image))
    source = ["source.kind=folder", f"source.path={tmp_path}/images", f"shards.path={tmp_path}/data"]
    assert cli.main(["prepare", *source]) == 0
    data = [f"data.path={tmp_path}/data/train", f"reference.path={tmp_path}/data/train"]
    refused(capsys, [*evaluate(top, "ssim"), *data], "needs images with sides of at least 11 pixels (got 8)")
