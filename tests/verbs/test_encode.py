"""Encoding: latents are those of the autoencoder, every worker writes the same bytes, and mistakes are one line."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_scale import cli, storage
from tarflow_scale.autoencoders.stored import autoencoder_files, build_autoencoder
from tarflow_scale.config.autoencoder import ConvolutionalConfig, TinyConfig
from tarflow_scale.config.data import AugmentationConfig
from tarflow_scale.loading import load_autoencoder
from tarflow_scale.records import PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.shards.events import LatentEvent
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.reader import ShardSet
from tests.conftest import refused
from tests.forking import start

KINDS = {
    "tiny": TinyConfig(latent_channels=4, width=8),
    "own": ConvolutionalConfig(factor=4, latent_channels=3, width=8, blocks=1),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images 3x16x16 of two classes, packed in shards of 8; two autoencoders in a registry."""
    top = tmp_path_factory.mktemp("encode")
    rng = np.random.default_rng(0)
    for number in range(50):
        folder = top / "images" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode_png(rng.integers(0, 256, (3, 16, 16), np.uint8)))
    arguments = ["source.kind=folder", f"source.path={top}/images", f"shards.path={top}/data"]
    assert cli.main(["prepare", *arguments, "shards.samples_per_shard=8"]) == 0
    for name, config in KINDS.items():
        torch.manual_seed(0)
        register(top, name, autoencoder_files(build_autoencoder(config)))
    return top


def register(top: Path, name: str, files: dict[str, bytes]) -> None:
    pixels = PixelFormat(bit_depth=8, noise="none").model_dump(mode="json")
    known = {"parameters": 1, "images_seen": None, "ema_half_life_images": None}
    fields = known | {"config_digest": "0" * 64, "git_commit": "none", "packages": {}}
    Registry(f"{top}/registry", name).register(files, {"pixels": pixels, "data": None, **fields}, "test")


def encode(world: Path, path: Path, *more: str, model: str = "own") -> list[str]:
    registry = [f"registry.path={world}/registry", f"registry.model={model}"]
    return ["encode", *registry, f"data.path={world}/data", f"shards.path={path}", "cluster.executor=local", *more]


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def encoded(world: Path) -> Path:
    path = world / "latents"
    assert cli.main(encode(world, path, "encoding.mirrored=true", "encoding.dtype=float32")) == 0
    return path


def test_latents_are_the_autoencoders_and_keep_samples_and_labels(world: Path, encoded: Path) -> None:
    autoencoder, digest = load_autoencoder(f"{world}/registry", "own", 1)
    for split in ("train", "test"):
        images, latents = ShardSet(f"{world}/data/{split}"), ShardSet(f"{encoded}/{split}", "full")
        assert latents.manifest.class_names == images.manifest.class_names
        assert [shard.file for shard in latents.manifest.shards] == [shard.file for shard in images.manifest.shards]
        everything = np.arange(images.manifest.num_images)
        ours, theirs = latents.take(everything), images.take(everything)
        assert (ours.labels == theirs.labels).all()
        assert [sample.key for sample in latents.stored()] == [sample.key for sample in images.stored()]
        event = latents.manifest.event
        assert isinstance(event, LatentEvent)
        assert event.facts.autoencoder == digest
        assert event.shape == (3, 4, 4)
        x = torch.from_numpy(np.ascontiguousarray(theirs.events)) / 127.5 - 1
        with torch.no_grad():
            mean, log_var = autoencoder.encode(x)
            assert log_var is not None
            assert np.allclose(ours.events, torch.cat([mean, log_var], 1), atol=1e-5)
            assert torch.allclose(
                autoencoder.decode(torch.from_numpy(ours.events)[:, :3]), autoencoder.decode(mean), atol=1e-4
            )


def test_mean_and_scale_are_those_of_draws_from_the_training_split(encoded: Path) -> None:
    train, test = (ShardSet(f"{encoded}/{split}").manifest for split in ("train", "test"))
    assert train.latents is not None
    assert test.latents == train.latents
    moments = torch.from_numpy(ShardSet(f"{encoded}/train").take(np.arange(train.num_images)).events).double()
    mean, log_var = moments.chunk(2, dim=1)
    generator = torch.Generator().manual_seed(0)
    draws = mean + (0.5 * log_var).exp() * torch.randn((400, *mean.shape), generator=generator, dtype=mean.dtype)
    assert torch.allclose(torch.tensor(train.latents.mean).double(), draws.mean(dim=(0, 1, 3, 4)), atol=0.02)
    assert torch.allclose(torch.tensor(train.latents.scale).double(), draws.std(dim=(0, 1, 3, 4)), rtol=0.01)


def test_the_mirrored_twin_is_the_latent_of_the_mirrored_image(world: Path, encoded: Path) -> None:
    autoencoder, _ = load_autoencoder(f"{world}/registry", "own", 1)
    images, latents = ShardSet(f"{world}/data/train"), ShardSet(f"{encoded}/train")
    event = latents.manifest.event
    assert isinstance(event, LatentEvent)
    carried, _ = latents.decode(latents.read(np.arange(1))[0])
    mirrored = images.take(np.arange(1)).events[..., ::-1]
    with torch.no_grad():
        expected = autoencoder.encode(torch.from_numpy(np.ascontiguousarray(mirrored)) / 127.5 - 1).mean
    chosen = {}
    for epoch in range(20):
        part = event.augment(carried, AugmentationConfig(flip=True), 0, epoch, 0)
        assert part.shape == event.augmented_shape(AugmentationConfig(flip=True))
        chosen[event.unpack(part[None])[0].tobytes()] = event.unpack(part[None])[0][:, :3]
    assert len(chosen) == 2  # with and without
    assert any(np.allclose(latent, expected, atol=1e-5) for latent in chosen.values())
    assert np.array_equal(event.augment(carried, AugmentationConfig(), 0, 0, 0), carried[:, :, : carried.shape[2] // 2])


@pytest.mark.parametrize(("dtype", "exact"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-6)])
@pytest.mark.parametrize("model", KINDS)
def test_types_are_recorded_and_round_as_they_say(
    world: Path, encoded: Path, tmp_path: Path, dtype: str, exact: float, model: str
) -> None:
    assert cli.main(encode(world, tmp_path / "l", f"encoding.dtype={dtype}", model=model)) == 0
    assert cli.main(["prepare", "--check", f"{tmp_path}/l/train"]) == 0
    shards = ShardSet(f"{tmp_path}/l/train")
    assert shards.manifest.latents is not None
    assert (shards.manifest.latents.dtype, shards.manifest.latents.has_variance) == (dtype, model == "own")
    if model == "own":
        exactly = ShardSet(f"{encoded}/train").take(np.arange(10)).events
        assert np.allclose(shards.take(np.arange(10)).events, exactly, rtol=exact, atol=exact)


def test_a_second_run_does_nothing_and_a_lost_shard_comes_back_with_the_same_bytes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = encode(world, tmp_path / "l")
    assert cli.main(arguments) == 0
    before = content(tmp_path / "l")
    assert cli.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    lost = sorted((tmp_path / "l/train").glob("*.tar"))[1]
    lost.unlink()
    assert cli.main(arguments) == 0
    assert "1 to encode" in capsys.readouterr().out
    assert content(tmp_path / "l") == before


@pytest.mark.ray
def test_any_number_of_workers_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    assert cli.main(encode(world, tmp_path / "one")) == 0
    ray = ["cluster.executor=ray", "cluster.num_workers=2"]
    assert start(*encode(world, tmp_path / "two", *ray)).wait() == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_killed_drivers_leave_what_the_next_one_completes(world: Path, tmp_path: Path) -> None:
    assert cli.main(encode(world, tmp_path / "whole", "encoding.batch_size=1")) == 0
    path = tmp_path / "killed"
    arguments = encode(world, path, "encoding.batch_size=1")
    rng = np.random.default_rng(0)
    for _ in range(20):
        process = start(*arguments)
        deadline = time.monotonic() + 600
        while process.poll() is None and not (path / "plan.json").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert cli.main(arguments) == 0
    complete = {name: file for name, file in content(path).items() if not name.endswith(storage.PARTIAL)}
    assert complete == content(tmp_path / "whole")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_other_latents_and_other_files_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(encode(world, tmp_path / "l")) == 0
    before = content(tmp_path / "l")
    refused(
        capsys, encode(world, tmp_path / "l", model="tiny"), "holds other latents (autoencoder was own@1, is tiny@1"
    )
    refused(capsys, encode(world, tmp_path / "l", "encoding.dtype=float32"), "encoding.dtype was float16, is float32")
    assert content(tmp_path / "l") == before
    (tmp_path / "notes.txt").write_text("mine")
    refused(capsys, encode(world, tmp_path), "holds other files (no plan.json)")
    latents = [f"data.path={tmp_path}/l", f"shards.path={tmp_path}/again"]
    refused(capsys, encode(world, tmp_path, *latents), "encode is for images (got 3x4x4 latents of")
    refused(capsys, encode(world, tmp_path / "x", f"data.path={tmp_path}"), "holds no packed images")


def test_images_that_the_autoencoder_cannot_encode_are_refused(
    world: Path, tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(
        capsys, encode(world, tmp_path / "l", f"data.path={digits}"), "must have the autoencoder's 3 channels (got 1)"
    )
    assert not (tmp_path / "l").exists()


def test_latents_that_are_not_finite_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(KINDS["own"])
    with torch.no_grad():
        autoencoder.get_parameter("encoder.0.weight").mul_(1e30)
        for parameter in autoencoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    register(world, "broken", autoencoder_files(autoencoder))
    refused(capsys, encode(world, tmp_path / "l", model="broken"), "latents must be finite numbers")
    assert not list(tmp_path.rglob("*.tar"))


def test_a_registered_flow_is_no_autoencoder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register(world, "flow", {"model.safetensors": b"x", "config.json": json.dumps({"model": {}}).encode()})
    refused(capsys, encode(world, tmp_path / "l", model="flow"), "does not hold an autoencoder")
