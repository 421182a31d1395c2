"""The verb ``convert``: a public .pth becomes a flow on disk and in a registry, which the other verbs use."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_scale import cli, load
from tarflow_scale.flows.ml_tarflow import load_ml_tarflow
from tarflow_scale.shards.images import encode_png
from tests.flows.ml_tarflow_reference import as_state_dict


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``.pth`` of 8x8 RGB with 3 classes, and a data set of that shape."""
    path = tmp_path_factory.mktemp("convert")
    with np.load(Path(__file__).parents[1] / "flows/ml_tarflow_fixture.npz") as fixture:
        torch.save(as_state_dict(fixture, "conditional"), path / "model_0.05.pth")
    rng = np.random.default_rng(0)
    for label in ("ant", "bee", "cat"):
        (path / "images" / label).mkdir(parents=True)
        for i in range(8):
            image = rng.integers(0, 256, (3, 8, 8), np.uint8)
            (path / "images" / label / f"{i}.png").write_bytes(encode_png(image))
    arguments = ["source.kind=folder", f"source.path={path}/images", f"shards.path={path}/data"]
    assert cli.main(["prepare", *arguments, "split.test_fraction=0.25"]) == 0
    return path


def convert(world: Path, *more: str) -> list[str]:
    noise = "weights.noise={kind: gaussian, std: 0.05}"
    return ["convert", f"weights.path={world}/model_0.05.pth", noise, *more]


def test_a_converted_flow_is_the_loaded_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(convert(world, f"output.path={tmp_path}/flow")) == 0
    assert "patch 2, width 64, 3 blocks of (2, 2, 2) layers, affine" in capsys.readouterr().out
    direct, saved = load_ml_tarflow(f"{world}/model_0.05.pth"), load(f"{tmp_path}/flow")
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    assert torch.equal(direct.log_prob(x, y), saved.log_prob(x, y))
    assert saved.pixels is not None
    assert (saved.pixels.bit_depth, saved.pixels.noise, saved.pixels.noise_std) == (8, "gaussian", 0.05)
    assert cli.main(convert(world, f"output.path={tmp_path}/flow")) == 0  # again: the same files


def test_a_registered_conversion_generates_guided_denoised_images(world: Path, tmp_path: Path) -> None:
    registry = [f"registry.path={tmp_path}/registry", "registry.model=public"]
    assert cli.main(convert(world, f"output.path={tmp_path}/flow", *registry, f"data.path={world}/data/train")) == 0
    arguments = ["sampling.num_images=6", f"shards.path={tmp_path}/out", "cluster.executor=local"]
    guided = ["sampling.guidance={scale: 1.2, annealed: true, attention_temperature: 0.8}", "sampling.denoise=1"]
    assert cli.main(["generate", *registry, *arguments, *guided]) == 0
    assert (tmp_path / "out/manifest.json").exists()
    assert cli.main(["models", "show", *registry]) == 0


def test_dry_run_writes_nothing(world: Path, tmp_path: Path) -> None:
    assert cli.main(convert(world, f"output.path={tmp_path}/flow", "--dry-run")) == 0
    assert not (tmp_path / "flow").exists()


def test_what_does_not_fit_is_named_and_leaves_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], digits: Path
) -> None:
    registry = [f"registry.path={tmp_path}/registry", "registry.model=public"]
    output = f"output.path={tmp_path}/flow"
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    cases = [
        (convert(world, output, *registry), "registry and data.path must be set together (got registry without data)"),
        (
            convert(world, output, *registry, f"data.path={digits}/train"),
            "digits must have the model's shape (3, 8, 8) and 3 classes (got (1, 8, 8) and 10)",
        ),
        (
            convert(world, output, "weights.num_channels=5"),
            "a token must be a square patch with 5 channels, got 12 features",
        ),
        (convert(world, output, f"weights.path={tmp_path}/absent.pth"), "does not exist"),
        (convert(world, output, f"weights.path={tmp_path}/bad.pth"), "cannot be read as plain weights"),
        (["convert", f"weights.path={world}/model_0.05.pth", output], "weights.noise: required section is missing"),
    ]
    for arguments, message in cases:
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_another_flow_is_not_overwritten(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(convert(world, f"output.path={tmp_path}/flow")) == 0
    before = (tmp_path / "flow/config.json").read_bytes()
    other = ["convert", f"weights.path={world}/model_0.05.pth", "weights.noise={kind: uniform}"]
    assert cli.main([*other, f"output.path={tmp_path}/flow"]) == 2
    assert "holds another model (config.json differs); choose another output.path" in capsys.readouterr().err
    assert (tmp_path / "flow/config.json").read_bytes() == before

    state = torch.load(world / "model_0.05.pth", weights_only=True)
    torch.save(state | {"blocks.0.proj_in.bias": torch.zeros(64)}, tmp_path / "same_sizes.pth")
    assert cli.main([*convert(world, f"output.path={tmp_path}/flow"), f"weights.path={tmp_path}/same_sizes.pth"]) == 2
    assert "holds another model (model.safetensors differs)" in capsys.readouterr().err
