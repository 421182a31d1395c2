"""Rectangular images and their latents through the verbs: prepare, train, generate, evaluate, score, report, export."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tarflow_scale import cli, load
from tarflow_scale.autoencoders.stored import autoencoder_files, build_autoencoder
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.prepare import SourceConfig
from tarflow_scale.density.pixels import image_bits_per_dim
from tarflow_scale.records import PixelFormat
from tarflow_scale.registry import Registry
from tarflow_scale.shards.images import decode_image, encode_png
from tarflow_scale.shards.reader import ShardSet
from tarflow_scale.shards.sources import open_source
from tests.conftest import command, train_arguments

HEIGHT, WIDTH, NUM = 12, 8, 400
MODELS = {
    "tarflow": ["model.log_scale_bound=1"],
    "glow": ["model={kind: glow, levels: 2, steps_per_level: 2, width: 16, class_conditional: true}"],
}
PROTOCOLS = (
    {"name": "bits", "metric": "bits_per_dim", "bit_depth": 4, "num_draws": 2, "seed": 0, "labels": "given"},
    {"name": "pixels", "metric": "frechet", "extractor": "pixels", "num_images": 100, "bit_depth": 4},
)


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits with their upper half repeated below, 12x8 pixels, packed; a TarFlow and a Glow of them."""
    path = tmp_path_factory.mktemp("rectangles")
    digits = open_source(SourceConfig(kind="digits"))
    for number in range(NUM):
        file = path / "images" / str(digits.labels[number]) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(high(digits.image(number))))
    arguments = ["source.kind=folder", f"source.path={path}/images", "source.bit_depth=4"]
    assert cli.main(["prepare", *arguments, f"shards.path={path}/data"]) == 0
    for facts in PROTOCOLS:
        (path / f"{facts['name']}.yaml").write_text(yaml.safe_dump(facts))
    for name, more in MODELS.items():
        validation = f"validation={{path: {path}/data/test, every_images: 640}}"
        result = command(*train(path, path / "data", name, *more, validation))
        assert result.returncode == 0, result.stderr
    return path


def high(digit: np.ndarray) -> np.ndarray:
    return np.concatenate([digit, digit[:, :4]], axis=1)


def train(path: Path, data: Path, name: str, *more: str) -> list[str]:
    short = ["training.total_images=960", "logging.preview_every_images=960"]
    return train_arguments(data, path / name, path / "registry", f"registry.model={name}", *short, *more)


def generate(path: Path, name: str, *more: str) -> list[str]:
    registry = [f"registry.path={path}/registry", f"registry.model={name}", "cluster.executor=local"]
    sampling = ["sampling.num_images=60", "sampling.batch_size=20", "shards.samples_per_shard=30"]
    return ["generate", *registry, *sampling, f"shards.path={path}/generated/{name}", *more]


def size_of_png(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_a_folder_of_rectangles_is_packed_as_it_is(top: Path) -> None:
    shards = ShardSet(f"{top}/data/train")
    assert shards.manifest.image_size_pixels == (HEIGHT, WIDTH)
    assert json.loads((top / "data/train/manifest.json").read_bytes())["image_size_pixels"] == [HEIGHT, WIDTH]
    assert str(shards.manifest.event) == "1x12x8 images, 4 bit"
    batch = shards.take(np.arange(20))
    digits = open_source(SourceConfig(kind="digits"))
    for image, stored in zip(batch.events, shards.read(np.arange(20)), strict=True):
        number = int(Path(shards.origin_of(stored)).stem)
        assert np.array_equal(image, high(digits.image(number)))
    for flag in ("--check", "--stats"):
        assert cli.main(["prepare", flag, f"{top}/data/train"]) == 0
    assert size_of_png(top / "data/train/contact-sheet.png") == (8 * (WIDTH + 1) + 1, 8 * (HEIGHT + 1) + 1)


@pytest.mark.parametrize("kind", ["folder", "zip", "webdataset", "parquet"])
def test_every_source_is_cropped_to_a_rectangle_as_pillow_does(kind: str, tmp_path: Path) -> None:
    """Photographs of 30x50 and 40x20 pixels; their corners in what covers 12x8 pixels are written out by hand."""
    pixels = [np.random.default_rng(seed).integers(0, 256, size, np.uint8) for seed, size in enumerate(SIZES)]
    files = {f"{number}.png": encode_png(image.transpose(2, 0, 1)) for number, image in enumerate(pixels)}
    source = {"kind": kind, "path": written(kind, tmp_path, files), "resize": "center_crop", "size_pixels": [12, 8]}
    arguments = [f"source.{key}={json.dumps(value)}" for key, value in source.items()]
    assert cli.main(["prepare", *arguments, "split.test_fraction=0", f"shards.path={tmp_path}/data"]) == 0
    packed = ShardSet(f"{tmp_path}/data/train")
    assert packed.manifest.event.shape == (3, 12, 8)
    assert "scaled to cover 12x8 pixels (lanczos), then centre crop" in packed.manifest.source
    expected = set[bytes]()
    for image, (resized, corner) in zip(pixels, (((20, 12), (6, 0)), ((8, 16), (0, 2))), strict=True):
        left, top = corner
        cropped = Image.fromarray(image).resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + 8, top + 12))
        expected.add(np.asarray(cropped).transpose(2, 0, 1).tobytes())
    assert {image.tobytes() for image in packed.take(np.arange(2)).events} == expected


SIZES = ((30, 50, 3), (40, 20, 3))


def written(kind: str, path: Path, files: dict[str, bytes]) -> str:
    """The same files as a source of each kind; returns its path."""
    (path / "source").mkdir()
    if kind == "folder":
        for name, content in files.items():
            (path / "source" / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path / "source/images.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return f"{path}/source/images.zip"
    elif kind == "webdataset":
        with tarfile.open(path / "source/a.tar", "w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table({"image": [{"bytes": content} for content in files.values()]})
        parquet.write_table(table, path / "source/train.parquet")
    return f"{path}/source"


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls_and_previews_have_the_shape_of_the_images(top: Path, name: str) -> None:
    lines = [json.loads(line) for line in (top / name / "log.jsonl").read_text().splitlines()]
    losses = [line["nats_per_dim"] for line in lines if "nats_per_dim" in line]
    assert losses[-1] < losses[0] - 0.1
    width, height = size_of_png(next((top / name / "previews").glob("images-*.png")))
    zoom, rest = divmod(width, 10 * (WIDTH + 1) + 1)
    assert rest == 0
    assert height > zoom * (4 * (HEIGHT + 1) + 1)  # the names of the classes are above the images


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_flow_maps_rectangles_there_and_back(top: Path, name: str) -> None:
    flow = load(f"{name}@latest", registry=f"{top}/registry").double()
    assert flow.event_shape == (1, HEIGHT, WIDTH)
    x = torch.rand(3, 1, HEIGHT, WIDTH, dtype=torch.float64) * 2 - 1
    y = torch.arange(3)
    z, log_det = flow(x, y)
    assert log_det.shape == (3,)
    assert torch.allclose(flow.inverse(z, y), x, atol=1e-6)
    nats = flow.nats_of_values(x, y)
    assert nats.shape == x.shape
    assert torch.allclose(nats.sum(dim=(1, 2, 3)), -flow.log_prob(x, y), rtol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_generated_shards_are_the_samples_of_load(top: Path, name: str) -> None:
    assert cli.main(generate(top, name, f"shards.folder={top}/files/{name}", f"shards.npz={top}/{name}.npz")) == 0
    shards = ShardSet(f"{top}/generated/{name}")
    assert str(shards.manifest.event) == "1x12x8 images, 4 bit"
    flow = load(f"{name}@latest", registry=f"{top}/registry")
    images = shards.take(np.arange(60)).events
    expected = flow.stored(flow.sample(60, torch.arange(60) % 10, seed=0)).numpy()
    assert (images != expected).mean() < 0.01  # a value on the edge of a level may be rounded to either
    with np.load(top / f"{name}.npz") as file:
        assert np.array_equal(file["arr_0"][..., 0], images[:, 0])
    files = sorted((top / "files" / name).rglob("*.png"))
    assert {size_of_png(file) for file in files} == {(WIDTH, HEIGHT)}
    grid = decode_image((top / "generated" / name / "grid.png").read_bytes(), "grid")
    assert grid.shape[2] == 6 * (10 * (WIDTH + 1) + 1)
    assert cli.main(generate(top, name, f"shards.folder={top}/files/{name}", f"shards.npz={top}/{name}.npz")) == 0


@pytest.fixture(scope="module")
def evaluated(top: Path) -> Path:
    """Both models, evaluated: bits/dim, and the Fréchet distance on pixels."""
    for name in MODELS:
        assert cli.main(evaluate(top, name, f"{top}/bits.yaml", f"{top}/pixels.yaml")) == 0
    return top


def evaluate(top: Path, name: str, *protocols: str) -> list[str]:
    registry = [f"registry.path={top}/registry", f"registry.model={name}", "cluster.executor=local"]
    data = [f"data.path={top}/data/test", f"reference.path={top}/data/train", f"reference.cache={top}/cache"]
    return ["evaluate", *registry, *data, f"metrics.protocols={json.dumps(protocols)}"]


@pytest.mark.parametrize("name", MODELS)
def test_metrics_of_rectangles(evaluated: Path, name: str) -> None:
    report = Registry(f"{evaluated}/registry", name).state().reports[1][-1]
    flow = load(f"{name}@latest", registry=f"{evaluated}/registry")
    batch = ShardSet(f"{evaluated}/data/test").take(np.arange(report.metrics["bits"].num_images))
    expected = image_bits_per_dim(flow, batch.events, torch.from_numpy(batch.labels), num_draws=2)
    assert report.metrics["bits"].value == pytest.approx(float(expected.mean()), abs=1e-4)
    assert report.metrics["bits"].value < 4
    assert report.metrics["pixels"].value > report.baselines["real_pixels"]


def test_a_report_shows_both_models(evaluated: Path) -> None:
    published = {"name": "bits", "title": "bits", "protocol": f"{evaluated}/bits.yaml", "published": []}
    (evaluated / "board.yaml").write_text(yaml.safe_dump(published))
    lists = {
        "leaderboards": [f"{evaluated}/board.yaml"],
        "registries": [f"{evaluated}/registry"],
        "runs": [f"{evaluated}/{name}" for name in MODELS],
    }
    arguments = [f"report.{key}={json.dumps(value)}" for key, value in lists.items()]
    assert cli.main(["report", f"report.path={evaluated}/page", *arguments]) == 0
    page = (evaluated / "page/index.html").read_text()
    assert all(f"{name}@1" in page for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_maps_of_surprise_show_whole_images(evaluated: Path, name: str) -> None:
    sets = [f"data.path={evaluated}/data/test", f"calibration.path={evaluated}/data/train"]
    registry = [f"registry.path={evaluated}/registry", f"registry.model={name}", "cluster.executor=local"]
    out = evaluated / "scores" / name
    assert cli.main(["score", *registry, *sets, f"scoring.path={out}", "scoring.maps=8"]) == 0
    zoom = 96 // HEIGHT
    assert size_of_png(out / "maps.png") == (zoom * (8 * (WIDTH + 1) + 1), zoom * (2 * (HEIGHT + 1) + 1))


def test_an_exported_model_has_its_card_and_samples(evaluated: Path) -> None:
    export = ["models", "export", f"registry.path={evaluated}/registry", "registry.model=glow"]
    assert cli.main([*export, f"command.path={evaluated}/exported"]) == 0
    assert "1x12x8 images, 4 bit" in (evaluated / "exported/README.md").read_text()
    flow, again = load("glow@latest", registry=f"{evaluated}/registry"), load(evaluated / "exported")
    assert torch.equal(flow.sample(2, torch.arange(2), seed=1), again.sample(2, torch.arange(2), seed=1))
    assert cli.main(["models", "show", f"registry.path={evaluated}/registry", "registry.model=glow"]) == 0


# -- latents -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(top: Path) -> Path:
    """Latents 3x6x4 of the digits, and a flow of them."""
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "factor": 2, "latent_channels": 3, "width": 8, "blocks": 1}
    config = ConvolutionalConfig.model_validate(sizes | {"posterior": "fixed", "posterior_std": 0.02})
    for name, of in (("autoencoder", config), ("coarse", config.model_copy(update={"factor": 8}))):
        pixels = PixelFormat(bit_depth=8, noise="none").model_dump(mode="json")
        known = {"parameters": 1, "images_seen": None, "ema_half_life_images": None, "config_digest": "0" * 64}
        fields = known | {"git_commit": "none", "packages": {}, "pixels": pixels, "data": None}
        Registry(f"{top}/registry", name).register(autoencoder_files(build_autoencoder(of)), fields, "test")
    assert cli.main(encode(top, "autoencoder", "encoding.mirrored=true")) == 0
    autoencoder = [f"autoencoder.path={top}/registry", "autoencoder.model=autoencoder"]
    noise = ["training.noise={kind: gaussian, std: 0.1}", "data.augmentation.flip=true"]
    result = command(
        *train(top, top / "latents", "latent", "model.patch_size=1", "model.log_scale_bound=1", *noise, *autoencoder)
    )
    assert result.returncode == 0, result.stderr
    return top


def encode(top: Path, model: str, *more: str) -> list[str]:
    registry = [f"registry.path={top}/registry", f"registry.model={model}", "cluster.executor=local"]
    name = "latents" if model == "autoencoder" else model
    return ["encode", *registry, f"data.path={top}/data", f"shards.path={top}/{name}", *more]


def test_latents_of_rectangles_are_rectangles(latents: Path) -> None:
    shards = ShardSet(f"{latents}/latents/train")
    assert shards.manifest.event.shape == (3, HEIGHT // 2, WIDTH // 2)
    assert shards.manifest.image_size_pixels == (HEIGHT // 2, WIDTH // 2)
    assert str(shards.manifest.event.shown) == "1x12x8 images, 4 bit"


def test_a_flow_of_latents_draws_rectangles(latents: Path) -> None:
    flow = load("latent@latest", registry=f"{latents}/registry")
    assert flow.event_shape == (3, 6, 4)
    x = flow.sample(60, torch.arange(60) % 10, seed=0)
    assert x.shape == (60, 1, HEIGHT, WIDTH)
    assert flow.pictures(x)[0].size == (WIDTH, HEIGHT)
    assert cli.main(generate(latents, "latent")) == 0
    shards = ShardSet(f"{latents}/generated/latent")
    assert shards.manifest.image_size_pixels == (HEIGHT, WIDTH)
    generated = shards.take(np.arange(60)).events
    assert np.abs(generated.astype(int) - flow.stored(x).numpy().astype(int)).max() <= 255 // 15
    assert cli.main(evaluate(latents, "latent", f"{latents}/pixels.yaml")) == 0


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_one_line(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = latents / "data"
    refused = {
        "multiples of model.patch_size": train(latents, data, "never", "model.patch_size=3"),
        "multiples of 2^(model.levels": train(
            latents, data, "never", "model={kind: realnvp, levels: 4, width: 8, residual_blocks: 1}"
        ),
        "multiples of 2^model.levels": train(
            latents, data, "never", "model={kind: glow, levels: 3, steps_per_level: 1, width: 8}"
        ),
        "crop_pixels must not exceed the image size (got 8x12 and 12x8)": train(
            latents, data, "never", "data.augmentation.crop_pixels=8x12"
        ),
        "multiples of the autoencoder's factor 8 (got 12x8)": encode(latents, "coarse"),
    }
    for reason, arguments in refused.items():
        capsys.readouterr()
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert not (latents / "never").exists()
    assert not (latents / "coarse").exists()
