"""Bad input: one clear line with the exact words, exit code 2, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tarflow_scale import cli
from tarflow_scale.flows import load_flow
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.registry import Registry
from tarflow_scale.shards.images import FILE_EXTENSIONS, encode_png
from tests.conftest import TOP, Trained, train_arguments


@dataclass(frozen=True)
class World:
    """Where a case may write, and what it may read."""

    tmp: Path
    trained: Trained

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def folder_source(self, **images: np.ndarray | bytes) -> list[str]:
        """``prepare`` on a folder of one class; names use ``_`` for ``.``."""
        (self.tmp / "images/class").mkdir(parents=True)
        for name, image in images.items():
            content = image if isinstance(image, bytes) else encode_png(image)
            (self.tmp / "images/class" / name.replace("_", ".")).write_bytes(content)
        return ["prepare", "source.kind=folder", f"source.path={self.tmp}/images", f"shards.path={self.out}"]

    def data_copy(self) -> Path:
        shutil.copytree(self.trained.data / "train", self.tmp / "data/train")
        return self.tmp / "data"

    def train(self, data: Path, *more: str) -> list[str]:
        return train_arguments(data, self.out, self.out, *more)

    def registry(self, verb: str, *more: str) -> list[str]:
        return [*verb.split(), f"registry.path={self.trained.registry}", "registry.model=small", *more]

    def generate(self, *more: str) -> list[str]:
        return self.registry(
            "generate", "sampling.num_images=20", f"shards.path={self.out}", "cluster.executor=local", *more
        )

    def evaluate(self, *more: str) -> list[str]:
        protocols = [str(TOP / f"evals/protocols/digits-{name}.yaml") for name in ("bits-per-dim", "frechet-pixels")]
        return self.registry(
            "evaluate",
            f"data.path={self.trained.data}/test",
            f"reference.path={self.trained.data}/train",
            f"reference.cache={self.out}",
            f"metrics.protocols={json.dumps(protocols)}",
            "cluster.executor=local",
            *more,
        )

    def gate(self) -> Path:
        facts = {
            "name": "g",
            "requirements": [{"protocol": str(TOP / "evals/protocols/digits-bits-per-dim.yaml"), "maximum": 9}],
        }
        (self.tmp / "gate.yaml").write_text(yaml.safe_dump(facts))
        return self.tmp / "gate.yaml"


def unknown_key(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "optimizer.lr=1"), "optimizer.lr: unknown key; check the spelling against --help"


def wrong_type(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "training.seed=soon"), (
        "training.seed: Input should be a valid integer, unable to parse string as an integer (got 'soon')"
    )


def out_of_range(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "training.label_drop=1.5"), (
        "training.label_drop: Input should be less than or equal to 1 (got 1.5)"
    )


def not_a_number(w: World) -> tuple[list[str], str]:
    return w.generate("sampling.temperature=.nan"), "sampling.temperature: Input should be a finite number (got nan)"


def folder_above_the_splits(w: World) -> tuple[list[str], str]:
    data = w.trained.data
    return [*w.train(data), f"data.path={data}"], (
        f"{data} is not a data set (no manifest.json); use {data}/train or {data}/test instead"
    )


def no_data_set(w: World) -> tuple[list[str], str]:
    return w.train(w.tmp / "absent"), (
        f"{w.tmp}/absent/train is not a data set (no manifest.json); run 'tarflow-scale prepare', or run it again if "
        f"it was interrupted"
    )


def half_written_data_set(w: World) -> tuple[list[str], str]:
    data = w.data_copy()
    (data / "train/manifest.json").unlink()
    return w.train(data), (
        f"{data}/train is not a data set (no manifest.json); run 'tarflow-scale prepare', or run it again if it "
        f"was interrupted"
    )


def damaged_manifest(w: World) -> tuple[list[str], str]:
    data = w.data_copy()
    (data / "train/manifest.json").write_text("{}")
    return w.train(data), (
        f"{data}/train/manifest.json is not a Manifest (name: Field required); the file is damaged, or another version "
        f"of tarflow-scale wrote it"
    )


def truncated_shard(w: World) -> tuple[list[str], str]:
    data = w.data_copy()
    tar = data / "train/train-00000.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:-1])
    return w.train(data), (
        f"{tar} does not match its manifest (got {size - 1} bytes, not {size}); pack the data set again"
    )


def changed_shard(w: World) -> tuple[list[str], str]:
    data = w.data_copy()
    tar = data / "train/train-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    return w.train(data, "data.verify=full"), (
        f"{tar} does not match its manifest (sha256 differs); pack the data set again"
    )


def empty_folder(w: World) -> tuple[list[str], str]:
    return w.folder_source(), (
        f"no images in {w.tmp}/images or its subfolders (looked for files that end in {', '.join(FILE_EXTENSIONS)}); "
        f"check source.path"
    )


def unreadable_image(w: World) -> tuple[list[str], str]:
    return w.folder_source(a_png=np.zeros((1, 8, 8), np.uint8), b_png=b"no image"), (
        f"{w.tmp}/images/class/b.png cannot be decoded (unknown image format); replace or remove the image, "
        f"or set source.bad_images=skip to leave out all unusable images"
    )


def other_files_in_the_way(w: World) -> tuple[list[str], str]:
    (w.tmp / "mine/train").mkdir(parents=True)
    (w.tmp / "mine/train/thesis.tex").write_text("x")
    return ["prepare", "source.kind=digits", f"shards.path={w.tmp}/mine"], (
        f"{w.tmp}/mine/train holds other files (got thesis.tex); choose another shards.path"
    )


def alias_that_is_a_number(w: World) -> tuple[list[str], str]:
    return w.registry("promote", f"gate.path={w.gate()}", "gate.alias='3'"), (
        "gate: alias must be a name, not a number or latest (got 3); for example, use champion"
    )


def several_sizes(w: World) -> tuple[list[str], str]:
    return w.folder_source(a_png=np.zeros((1, 8, 8), np.uint8), b_png=np.zeros((1, 9, 9), np.uint8)), (
        f"all images must have the same size (got 9x9 for {w.tmp}/images/class/b.png, not 8x8); set "
        f"source.resize=center_crop and source.size_pixels, or set source.bad_images=skip to "
        f"leave out all unusable images"
    )


def resize_without_a_size(w: World) -> tuple[list[str], str]:
    return [*w.folder_source(a_png=np.zeros((1, 8, 8), np.uint8)), "source.resize=center_crop"], (
        "source: source.size_pixels is required for resize=center_crop (got None); set it to a number of pixels"
    )


def batch_that_does_not_divide(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "training.micro_batch_size=12"), (
        "training.global_batch_size must be a multiple of training.micro_batch_size (got 32 and 12); use 24"
    )


def batch_larger_than_the_data(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "training.global_batch_size=4096"), (
        "the global batch must not take more samples from a data set than it has (got 4096, and the data set has "
        "1438); lower training.global_batch_size"
    )


def patch_that_does_not_divide(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "model.patch_size=3"), (
        "image height and width must be multiples of model.patch_size (got 8x8 and 3); choose another patch size"
    )


def levels_that_do_not_divide(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "model={kind: glow, levels: 4, steps_per_level: 1}"), (
        "image height and width must be multiples of 2^model.levels (got 8x8 and 2^4 = 16); choose fewer levels"
    )


def logit_of_gaussian_noise(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "model.logit_alpha=0.01", "training.noise={kind: gaussian, std: 0.1}"), (
        "model.logit_alpha needs training.noise.kind=uniform, which stays inside [-1, 1] (got gaussian); remove "
        "model.logit_alpha, or set the noise to uniform"
    )


def denoising_of_uniform_noise(w: World) -> tuple[list[str], str]:
    return w.generate("sampling.denoise=1"), (
        "sampling.denoise needs a model trained with Gaussian noise (got 1 for uniform noise); set it to 0"
    )


def protocol_of_nine_bits(w: World) -> tuple[list[str], str]:
    facts = yaml.safe_load((TOP / "evals/protocols/digits-bits-per-dim.yaml").read_text())
    (w.tmp / "edition.yaml").write_text(yaml.safe_dump(facts | {"bit_depth": 9}))
    return w.evaluate(f"metrics.protocols=[{w.tmp}/edition.yaml]"), (
        f"metrics.protocols: in the protocol file {w.tmp}/edition.yaml: bits_per_dim.bit_depth: Input should be less "
        f"than or equal to 8 (got 9)"
    )


def weights_that_are_not_finite(w: World) -> tuple[list[str], str]:
    """Registered by another program, say: what is stored is intact, and still no model."""
    flow = load_flow(str(w.trained.run / "model"))
    with torch.no_grad():
        next(flow.parameters())[0] = float("nan")
    store = Registry(str(w.tmp / "registry"), "small")
    facts = Registry(str(w.trained.registry), "small").resolve(1).model_dump(mode="json", exclude={"version", "files"})
    store.register(flow_files(flow), facts, reason="broken")
    count = next(flow.parameters())[0].numel()
    name = next(name for name, _ in flow.named_parameters())
    return w.generate(f"registry.path={w.tmp}/registry"), (
        f"small@1 does not contain a valid flow (weights must be finite (got {count} values of {name} that are not)); "
        f"export or register the flow again"
    )


def mnist_that_is_missing(w: World) -> tuple[list[str], str]:
    return ["prepare", "source.kind=mnist", f"source.path={w.tmp}/mnist.npz", f"shards.path={w.out}"], (
        f"there is no {w.tmp}/mnist.npz; check source.path"
    )


def no_registry(w: World) -> tuple[list[str], str]:
    return ["models", "list", f"registry.path={w.tmp}/absent"], (
        f"no registry at {w.tmp}/absent; finish a training run first, or check the path"
    )


def no_model(w: World) -> tuple[list[str], str]:
    return ["models", "show", f"registry.path={w.trained.registry}", "registry.model=large"], (
        f"no model 'large' in the registry {w.trained.registry} (its models: small); check registry.model"
    )


def no_version(w: World) -> tuple[list[str], str]:
    return w.evaluate("registry.version=9"), "small has no version 9 (its versions: 1); check the number"


def no_alias(w: World) -> tuple[list[str], str]:
    return w.generate("registry.version=champion"), (
        "small has no alias 'champion' (its aliases: none); promote a version first, or use another reference, such as "
        "latest"
    )


def no_report(w: World) -> tuple[list[str], str]:
    return w.registry("promote", f"gate.path={w.gate()}"), (
        "small@1 does not pass gate g (got NO for 1 of 1 requirements, see the table); champion was not moved"
    )


def gate_of_no_protocol(w: World) -> tuple[list[str], str]:
    facts = {"name": "g", "requirements": [{"protocol": f"{w.tmp}/absent.yaml", "maximum": 9}]}
    (w.tmp / "gate.yaml").write_text(yaml.safe_dump(facts))
    return w.registry("promote", f"gate.path={w.tmp}/gate.yaml"), (
        f"protocol of gate g: cannot read the protocol file {w.tmp}/absent.yaml (No such file or directory); check the "
        f"path"
    )


def model_with_a_path_for_a_name(w: World) -> tuple[list[str], str]:
    return ["models", "show", f"registry.path={w.trained.registry}", "registry.model=../small"], (
        "registry.model: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$' (got '../small')"
    )


def data_of_another_depth(w: World) -> tuple[list[str], str]:
    facts = yaml.safe_load((TOP / "evals/protocols/digits-bits-per-dim.yaml").read_text())
    (w.tmp / "edition.yaml").write_text(yaml.safe_dump(facts | {"bit_depth": 8}))
    return w.evaluate(f"metrics.protocols=[{w.tmp}/edition.yaml]"), (
        "protocol bits_per_dim is for 8-bit images (got 1x8x8 images, 4 bit in digits/test); choose another protocol"
    )


def generation_of_another_plan(w: World) -> tuple[list[str], str]:
    path = w.tmp / "generated"
    assert cli.main(w.generate(f"shards.path={path}")) == 0
    return w.generate(f"shards.path={path}", "sampling.seed=1"), (
        f"{path} holds another plan (seed was 0, is 1); choose another shards.path"
    )


def generation_among_other_files(w: World) -> tuple[list[str], str]:
    (w.tmp / "thesis").mkdir()
    (w.tmp / "thesis/chapter.tex").write_text("x")
    return w.generate(f"shards.path={w.tmp}/thesis"), (
        f"{w.tmp}/thesis holds other files (no plan.json); choose another shards.path"
    )


def crop_larger_than_the_images(w: World) -> tuple[list[str], str]:
    return w.train(w.trained.data, "data.augmentation.crop_pixels=9"), (
        "data.augmentation.crop_pixels must not exceed the image size (got 9x9 and 8x8); lower or remove "
        "data.augmentation.crop_pixels"
    )


def set_of_a_mix_without_a_slot(w: World) -> tuple[list[str], str]:
    mix = json.dumps([{"path": f"{w.trained.data}/test", "weight": 1e-6}])
    return w.train(w.trained.data, f"data.mix={mix}"), (
        f"every data set of a mix must have a sample in the global batch (got none for {w.trained.data}/test, with "
        f"weight 1e-06 of 1 and training.global_batch_size=32); raise training.global_batch_size"
    )


def in_place_elsewhere(w: World) -> tuple[list[str], str]:
    return ["prepare", "source.kind=webdataset", "source.path=a", "source.in_place=true", f"shards.path={w.out}"], (
        f"shards.path must equal source.path if source.in_place is true, because the tars stay where they are (got "
        f"{w.out} and a); set both to the same path"
    )


def null_character(w: World) -> tuple[list[str], str]:
    """Which no path can hold."""
    return ["report", f"report.path={w.out}", 'report.runs=["a\\0b"]'], (
        "report.runs.0: a value must not hold a null character (got 'a\\x00b'); remove it"
    )


def override_without_a_reason(w: World) -> tuple[list[str], str]:
    return w.registry("promote", f"gate.path={w.gate()}", "--override", " "), (
        "gate: override must be a reason (got an empty text); write why the version is promoted, which is stored"
    )


def unknown_format(w: World) -> tuple[list[str], str]:
    return ["prepare", "source.kind=lmdb", "source.path=a", f"shards.path={w.out}"], (
        "source.kind: Input should be 'digits', 'folder', 'zip', 'mnist', 'cifar', 'imagenet_npz', 'parquet', "
        "'webdataset' or 'vectors' (got 'lmdb')"
    )


def mixed_channels(w: World) -> tuple[list[str], str]:
    """One in colours, not among the 64 that decide."""
    some = {f"i{number:03d}_png": np.zeros((3 if number == 1 else 1, 4, 4), np.uint8) for number in range(131)}
    return w.folder_source(**some), (
        f"images must be all grey or all coloured (got a colour image, {w.tmp}/images/class/i001.png, among grey "
        f"ones); convert them, or set source.bad_images=skip to leave out all unusable images"
    )


def check_of_no_data_set(w: World) -> tuple[list[str], str]:
    return ["prepare", "--check", str(w.tmp)], (
        f"{w.tmp} is not a data set (no manifest.json); run 'tarflow-scale prepare', or run it again if it was "
        f"interrupted"
    )


CASES: list[Callable[[World], tuple[list[str], str]]] = [
    unknown_key,
    wrong_type,
    out_of_range,
    not_a_number,
    folder_above_the_splits,
    no_data_set,
    half_written_data_set,
    damaged_manifest,
    truncated_shard,
    changed_shard,
    empty_folder,
    unreadable_image,
    other_files_in_the_way,
    alias_that_is_a_number,
    several_sizes,
    resize_without_a_size,
    batch_that_does_not_divide,
    batch_larger_than_the_data,
    patch_that_does_not_divide,
    levels_that_do_not_divide,
    logit_of_gaussian_noise,
    denoising_of_uniform_noise,
    protocol_of_nine_bits,
    weights_that_are_not_finite,
    mnist_that_is_missing,
    no_registry,
    no_model,
    no_version,
    no_alias,
    no_report,
    gate_of_no_protocol,
    model_with_a_path_for_a_name,
    data_of_another_depth,
    generation_of_another_plan,
    generation_among_other_files,
    crop_larger_than_the_images,
    set_of_a_mix_without_a_slot,
    in_place_elsewhere,
    unknown_format,
    mixed_channels,
    check_of_no_data_set,
    null_character,
    override_without_a_reason,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input(
    case: Callable[[World], tuple[list[str], str]],
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(tmp_path, trained)
    arguments, message = case(world)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert cli.main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.split("\n") if " s passed" not in line and line]
    assert [line.partition(" object at 0x")[0] for line in errors] == [
        f"tarflow-scale: error: {message}".partition(" object>")[0]
    ]
    if case not in (unreadable_image, mixed_channels):
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not any(path.is_file() for path in world.out.rglob("*"))
