"""A flow on latents through all verbs: encode, train, resume, load, generate, evaluate, export, import."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflow_scale import cli, load
from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.autoencoders.stored import autoencoder_files, build_autoencoder
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.data import DataConfig
from tarflow_scale.errors import DataError
from tarflow_scale.records import PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.mix import open_mix
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.training.noise import model_input
from tests.conftest import command, refused, train_arguments

NOISE = ("training.noise={kind: gaussian, std: 0.1}", "data.augmentation.flip=true", "model.patch_size=1")


def register(registry: Path, name: str, autoencoder: Autoencoder) -> None:
    pixels = PixelFormat(bit_depth=8, noise="none").model_dump(mode="json")
    known = {"parameters": 1, "images_seen": None, "ema_half_life_images": None, "config_digest": name.ljust(64, "0")}
    fields = known | {"git_commit": "none", "packages": {}, "pixels": pixels, "data": None}
    Registry(str(registry), name).register(autoencoder_files(autoencoder), fields, "test")


@pytest.fixture(scope="module")
def top(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of the digits, two autoencoders in a registry, and a flow on the latents of the first."""
    path = tmp_path_factory.mktemp("latents")
    for seed, name in enumerate(("autoencoder", "other")):
        torch.manual_seed(seed)
        sizes = {"num_channels": 1, "factor": 2, "latent_channels": 3, "width": 8, "blocks": 1}
        config = ConvolutionalConfig.model_validate(sizes | {"posterior": "fixed", "posterior_std": 0.02})
        register(path / "registry", name, build_autoencoder(config))
    encode = ["encode", f"registry.path={path}/registry", "registry.model=autoencoder", "cluster.executor=local"]
    more = ["encoding.mirrored=true", f"data.path={digits}", f"shards.path={path}/latents"]
    assert cli.main([*encode, *more]) == 0
    result = command(*arguments(path))
    assert result.returncode == 0, result.stderr
    return path


def arguments(path: Path, *more: str, run: str = "run") -> list[str]:
    named = [f"autoencoder.path={path}/registry", "autoencoder.model=autoencoder"]
    validation = f"validation={{path: {path}/latents/test, every_images: 640}}"
    train = train_arguments(
        path / "latents", path / run, path / "registry", *NOISE, *named, validation, "registry.model=flow"
    )
    return [*train, *more]


def test_the_loss_falls_and_previews_are_images(top: Path) -> None:
    lines = [json.loads(line) for line in (top / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["nats_per_dim"] < lines[0]["nats_per_dim"] - 0.1
    assert all(line["bits_per_dim"] is None for line in lines)
    assert list((top / "run/previews").glob("*.png"))


def test_a_draw_depends_on_seed_epoch_and_sample_alone(top: Path) -> None:
    config = DataConfig.model_validate({"path": f"{top}/latents/train", "augmentation": {"flip": True}})
    whole, half = (Loader(open_mix(config, 8, 0), slots, config, 0) for slots in (range(8), range(4, 8)))
    pixels = PixelFormat(bit_depth=8, noise="gaussian", noise_std=0.1)
    batch, part = whole.first(), half.first()
    x = model_input(batch, pixels, 5, torch.device("cpu"))
    assert torch.equal(x[4:], model_input(part, pixels, 5, torch.device("cpu")))
    assert not torch.equal(x, model_input(batch, pixels, 6, torch.device("cpu")))
    assert batch.latents is not None
    mean, log_var = torch.from_numpy(batch.events).chunk(2, dim=1)
    centre, scale = (torch.tensor(v)[:, None, None] for v in (batch.latents.mean, batch.latents.scale))
    eps = (x * scale + centre - mean) / (log_var.exp() + (0.1 * scale) ** 2).sqrt()
    assert abs(float(eps.mean())) < 0.15
    assert abs(float(eps.std()) - 1) < 0.1


def test_draws_over_the_data_set_are_standardised(top: Path) -> None:
    shards = ShardSet(f"{top}/latents/train")
    batch = shards.take(np.arange(shards.manifest.num_images))
    x = model_input(batch, PixelFormat(bit_depth=8, noise="gaussian"), 0, torch.device("cpu"))
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.02)
    assert torch.allclose(x.std(dim=(0, 2, 3)), torch.ones(3), atol=0.02)


def test_a_loaded_flow_draws_images_and_scores_latents(top: Path) -> None:
    flow = load("flow@latest", registry=f"{top}/registry")
    assert flow.event_shape == (3, 4, 4)
    x = flow.sample(6, torch.arange(6), seed=0)
    assert x.shape == (6, 1, 8, 8)
    assert torch.equal(x[2:4], flow.sample(4, torch.arange(4), seed=0)[2:4])
    assert flow.pictures(x)[0].size == (8, 8)
    assert flow.stored(x).dtype == torch.uint8
    assert not [name for name in flow.state_dict() if "decoder" in name or "encoder" in name]
    latents = torch.randn(4, 3, 4, 4)
    assert flow.log_prob(latents, torch.arange(4)).shape == (4,)
    exported = load(top / "run/model")
    assert torch.equal(exported.sample(6, torch.arange(6), seed=0), x)


def test_generated_shards_hold_images_and_are_the_samples_of_load(top: Path, tmp_path: Path) -> None:
    generate = ["generate", f"registry.path={top}/registry", "registry.model=flow", "cluster.executor=local"]
    more = [
        "sampling.num_images=60",
        "sampling.batch_size=20",
        "shards.samples_per_shard=30",
        f"shards.path={tmp_path}/g",
    ]
    assert cli.main([*generate, *more]) == 0
    assert cli.main(["prepare", "--check", f"{tmp_path}/g"]) == 0
    shards = ShardSet(f"{tmp_path}/g")
    assert str(shards.manifest.event) == "1x8x8 images, 8 bit"
    flow = load("flow@latest", registry=f"{top}/registry")
    expected = flow.stored(flow.sample(60, torch.arange(60) % 10, seed=0)).numpy().astype(int)
    assert np.abs(shards.take(np.arange(60)).events.astype(int) - expected).max() <= 1


def test_sampled_metrics_are_measured_on_pixels(top: Path, digits: Path, tmp_path: Path) -> None:
    protocol = "name: pixels\nmetric: frechet\nextractor: pixels\nnum_images: 100\nbit_depth: 4\n"
    (tmp_path / "pixels.yaml").write_text(protocol)
    evaluate = ["evaluate", f"registry.path={top}/registry", "registry.model=flow", "cluster.executor=local"]
    data = [f"data.path={digits}/test", f"reference.path={digits}/train", f"reference.cache={tmp_path}/cache"]
    assert cli.main([*evaluate, *data, f"metrics.protocols=[{tmp_path}/pixels.yaml]"]) == 0
    report = Registry(f"{top}/registry", "flow").state().reports[1][-1]
    assert report.metrics["pixels"].value > report.baselines["real_pixels"]


def test_an_exported_version_is_whole(top: Path, tmp_path: Path) -> None:
    export = ["models", "export", f"registry.path={top}/registry", "registry.model=flow", f"command.path={tmp_path}/e"]
    assert cli.main(export) == 0
    assert (tmp_path / "e/autoencoder.safetensors").exists()
    flow, again = load("flow@latest", registry=f"{top}/registry"), load(tmp_path / "e")
    assert torch.equal(flow.sample(2, torch.arange(2), seed=1), again.sample(2, torch.arange(2), seed=1))
    imported = ["models", "import", f"registry.path={tmp_path}/r", "registry.model=flow", f"command.path={tmp_path}/e"]
    assert cli.main(imported) == 0
    assert cli.main(["models", "show", f"registry.path={tmp_path}/r", "registry.model=flow"]) == 0
    (tmp_path / "e/autoencoder.json").write_text((tmp_path / "e/autoencoder.json").read_text().replace("0.02", "0.03"))
    with pytest.raises(DataError, match="must have the autoencoder of its latents"):
        load(tmp_path / "e")


def test_settings_that_do_not_fit_latents_are_one_line(
    top: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, arguments(top, "autoencoder=null", run="no"), "the section autoencoder")
    refused(capsys, arguments(top, "autoencoder.model=other", run="no"), "the one that made the latents")
    refused(capsys, arguments(top, "training.noise={kind: uniform}", run="no"), "training.noise.kind must be gaussian")
    refused(
        capsys,
        arguments(top, "data.augmentation.crop_pixels=2", run="no"),
        "data.augmentation.crop_pixels needs images",
    )
    images = [f"data.path={digits}/train", "validation=null", "data.augmentation.flip=false"]
    refused(capsys, arguments(top, *images, run="no"), "the section autoencoder")
    assert not (top / "no").exists()
    plain = tmp_path / "plain"
    encode = ["encode", f"registry.path={top}/registry", "registry.model=autoencoder", "cluster.executor=local"]
    assert cli.main([*encode, f"data.path={digits}", f"shards.path={plain}"]) == 0
    refused(
        capsys,
        arguments(top, f"data.path={plain}/train", "validation=null", run="no"),
        "data.augmentation.flip needs images, or latents",
    )
    score = ["score", f"registry.path={top}/registry", "registry.model=flow", f"data.path={digits}/test"]
    more = [f"calibration.path={digits}/test", f"scoring.path={tmp_path}/scores"]
    refused(capsys, [*score, *more], "has only a bound on the likelihood")


def test_a_run_on_latents_resumes_bit_for_bit(top: Path) -> None:
    run = top / "resumed"
    assert command(*arguments(top, "training.max_seconds=0.001", run="resumed")).returncode == 75
    assert command(*arguments(top, run="resumed")).returncode == 0
    files = [file.name for file in (top / "run/model").iterdir()]
    assert all((run / "model" / name).read_bytes() == (top / "run/model" / name).read_bytes() for name in files)
