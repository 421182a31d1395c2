"""Every training recipe: its plan for the data it names, and a real step at 512 pixels."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from tarflow_scale import cli
from tarflow_scale.autoencoders.stored import autoencoder_files, build_autoencoder, digest_of
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.records import LatentFacts, VectorFacts
from tarflow_scale.registry import Registry
from tarflow_scale.shards.images import encode_png
from tarflow_scale.shards.manifest import Manifest, ShardRecord
from tarflow_scale.shards.writer import publish_manifest
from tests.conftest import TOP, command
from tests.test_latents import register

RECIPES = sorted((TOP / "configs/train").glob("*.yaml"))
FORMATS = {
    "demo": (8, 1, 10, 4), "mine": (32, 3, 3, 8), "mine-64": (64, 3, 3, 8),
    "mnist": (28, 1, 10, 8), "cifar10": (32, 3, 10, 8),
    "imagenet64": (64, 3, 1000, 8), "imagenet128": (128, 3, 1000, 8), "afhq256": (256, 3, 3, 8),
    "celebahq256": (256, 3, 0, 5), "images512": (512, 3, 10, 8), "images1024": (1024, 3, 10, 8),
    "vectors": (1, 2, 2, 8), "imagenet256-latents": (32, 4, 1000, 8), "imagenet512-latents": (64, 4, 1000, 8),
}  # fmt: skip
"""Pixels, channels, classes and bits of the data set that a recipe names."""


def stand_in(path: Path, name: str, latents: LatentFacts | None = None) -> None:
    """A data set that opens like the one of a recipe; its shard has the size that is announced, and no samples."""
    pixels, channels, classes, bits = FORMATS[name]
    path.mkdir(parents=True)
    (path / "a.tar").write_bytes(bytes(1024))
    (path / "a.index.npz").write_bytes(b"not read")
    record = ShardRecord(file="a.tar", samples=5000, bytes=1024, sha256="0" * 64, index_sha256="0" * 64)
    manifest = Manifest(
        name=name,
        split="train",
        image_size_pixels=pixels,
        num_channels=channels,
        class_names=tuple(str(number) for number in range(classes)),
        bit_depth=bits,
        source="a test",
        recipe="0" * 64,
        shards=(record,),
        vectors=VectorFacts(num_values=channels) if name == "vectors" else None,
        latents=latents,
    )
    publish_manifest(str(path), manifest)


def autoencoder_of(registry: Path, model: str, name: str) -> LatentFacts:
    """Register a small autoencoder in place of the one of a recipe; the facts of its latents."""
    pixels, channels, _, bits = FORMATS[name]
    config = ConvolutionalConfig(factor=8, latent_channels=channels, width=8, blocks=1)
    autoencoder = build_autoencoder(config)
    register(registry, model, autoencoder)
    return LatentFacts(
        autoencoder=digest_of(autoencoder_files(autoencoder)),
        shape=(channels, pixels, pixels),
        image_shape=(3, 8 * pixels, 8 * pixels),
        bit_depth=bits,
        has_variance=True,
        dtype="float16",
        has_mirrored=True,
        mean=(0.0,) * channels,
        scale=(1.0,) * channels,
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig.load(recipe, [])
    (name,) = {part for part in Path(config.data.path).parts if part in FORMATS}
    paths = [f"data.path={tmp_path}/train", "data.verify=size", f"logging.path={tmp_path}/run"]
    latents = None
    if name.endswith("latents"):
        assert config.autoencoder is not None
        latents = autoencoder_of(tmp_path / "registry", config.autoencoder.model, name)
        paths.append(f"autoencoder.path={tmp_path}/registry")
    stand_in(tmp_path / "train", name, latents)
    if config.validation is not None:
        stand_in(tmp_path / "test", name)
        paths.append(f"validation.path={tmp_path}/test")
    ranks = config.training.global_batch_size // config.training.micro_batch_size
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert cli.main(["train", str(recipe), *paths, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert f"= {config.training.micro_batch_size} x {ranks} ranks x 1 accumulated" in plan
    assert "GiB per rank" in plan
    assert "TFLOP per image" in plan


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_to_expect(recipe: Path) -> None:
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Cost:", "Expected:"):
        assert any(line.startswith(f"# {word}") for line in header), word


OWN = ("folder", "folder-gpu", "folder-autoencoder")
"""Recipes for a newcomer's own images."""


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_for_own_images_can_be_extended_without_a_jump(name: str) -> None:
    """A checkpoint is made where the learning rate begins to fall, and is kept."""
    config = TrainConfig.load(TOP / f"configs/train/{name}.yaml", [])
    assert config.schedule.kind == "wsd"
    assert config.schedule.decay_images is not None
    start = config.training.total_images - config.schedule.decay_images
    assert config.checkpoint.keep_every_images is not None
    for count in (
        config.training.global_batch_size,
        config.checkpoint.every_images,
        config.checkpoint.keep_every_images,
    ):
        assert start % count == 0
    assert config.checkpoint.every_images % config.training.global_batch_size == 0


def header(name: str) -> str:
    lines = (TOP / f"configs/train/{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_the_recipe_for_two_cores_says_the_result_that_was_measured() -> None:
    results = json.loads((TOP / "evals/results/champion-mine-kodak.json").read_text())
    config = TrainConfig.load(TOP / "configs/train/folder.yaml", [])
    number, version = results["report"]["metrics"]["bits_per_dim"], results["version"]
    said = header("folder")
    assert version["images_seen"] == config.training.total_images
    assert f"{number['value']:.2f} bits/dim on {number['num_images']} tiles" in said
    assert f"trained on {version['data']['num_images']:,} others" in said
    assert f"seed {config.training.seed}" in said
    assert f"{version['images_seen']:,} images" in said


def test_the_recipe_for_a_gpu_says_what_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(tmp_path / "train", "mine-64")
    stand_in(tmp_path / "test", "mine-64")
    paths = [f"data.path={tmp_path}/train", f"validation.path={tmp_path}/test"]
    said = header("folder-gpu")
    for card, name in (("h100", "an H100"), ("rtx-4090", "an RTX 4090")):
        (time,) = re.findall(rf"([\d.]+ (?:minutes|hours)) of {name}", said)
        arguments = [
            "plan",
            str(TOP / "configs/train/folder-gpu.yaml"),
            *paths,
            "--gpus",
            "1",
            "--gpu",
            card,
        ]
        assert cli.main(arguments) == 0
        plan = capsys.readouterr().out
        assert f"{time} for 4,000,000 images" in plan
        (operations,) = re.findall(r"([\d.e+]+) FLOP in total", plan)
        assert f"{float(operations):.1e}".replace("+", "") in said
    assert "not measured" in said


def test_the_commands_of_the_autoencoder_recipe_run(tmp_path: Path) -> None:
    """The run, ``encode`` and the decoder as the header says, on smaller images and fewer of them."""
    for number in range(20):
        image = np.random.default_rng(number).integers(0, 256, (3, 16, 16), np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"images/{number}.png").write_bytes(encode_png(image))
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(TOP / name)
    said = header("folder-autoencoder")
    lines = re.findall(
        r"(?:tarflow-scale|launch/torchrun\.sh 2) ((?:prepare |encode |configs/train).*?)(?= [A-Z]\w+:|$)", said
    )
    commands = [shlex.split(line) for line in lines]
    smaller = [
        "training.total_images=64", "training.global_batch_size=16", "model.width=8", "schedule.warmup_images=16",
        "schedule.decay_images=16", "checkpoint.every_images=48", "validation.every_images=48",
    ]  # fmt: skip
    more = {
        "prepare": ["source.path=images", "source.size_pixels=16"],
        "encode": ["cluster.executor=local"],
        "configs/train/folder-autoencoder.yaml": smaller,
    }
    verbs = [words[0] for words in commands]
    assert verbs == [
        "prepare",
        "configs/train/folder-autoencoder.yaml",
        "encode",
        "configs/train/folder-autoencoder.yaml",
    ]
    for words in commands:
        given = [
            part for part in more[words[0]] if not (part.startswith("model.") and "model={kind: decoder}" in words)
        ]
        verb = [] if words[0] in ("prepare", "encode") else ["train"]
        result = command(*verb, *words, *given, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    registry = Registry(f"{tmp_path}/runs/registry", "decoder-64")
    assert registry.resolve("latest").started_from.startswith("autoencoder-64@1 ")
    assert (tmp_path / "data/mine-64-latents/train/manifest.json").exists()


@pytest.mark.slow
def test_one_step_at_512_pixels(tmp_path: Path) -> None:
    """The recipe for 512 pixels with a narrow model, on images, from the command line."""
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(2):
            image = np.random.default_rng(number).integers(0, 256, (3, 512, 512), np.uint8)
            (tmp_path / "images" / label / f"{number}.png").write_bytes(encode_png(image))
    source = ["source.kind=folder", f"source.path={tmp_path}/images", "split.test_fraction=0"]
    assert cli.main(["prepare", *source, f"shards.path={tmp_path}/packed"]) == 0
    narrow = ["model.width=64", "model.layers_per_block=[1,1,1,1,1,2]", "parallelism.compile=false"]
    counts = ["training.total_images=4", "training.global_batch_size=2", "training.micro_batch_size=1"]
    more = ["schedule.warmup_images=0", "data.num_workers=0", "logging.every_images=2"]
    result = command(
        "train", "configs/train/deep-shallow-512.yaml", f"data.path={tmp_path}/packed/train", *narrow, *counts, *more,
        f"logging.path={tmp_path}/run", f"registry.path={tmp_path}/registry", "logging.preview_every_images=1000000",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [2, 4]
    assert all(np.isfinite(line["nats_per_dim"]) and line["skipped_steps"] == 0 for line in lines)
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert resolved["model"]["patch_size"] == 16
