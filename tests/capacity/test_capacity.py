"""The planner: its parts compared with closed forms and real tensors; advice, errors, the curve and its picture."""

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tarflow_scale import cli
from tarflow_scale.autoencoders.stored import build_autoencoder
from tarflow_scale.capacity.activations import Footprint, activation_footprint
from tarflow_scale.capacity.advice import USABLE, Scenario, advice, by_stage, largest_micro_batch, variant
from tarflow_scale.capacity.flops import training_flops
from tarflow_scale.capacity.gpus import CARDS, card_named, card_of_device
from tarflow_scale.capacity.memory import BUCKET_ELEMENTS, LIVE_ELEMENTS, ModelSize, Ranks, memory_of
from tarflow_scale.capacity.steps import (
    LATENCY_SECONDS,
    LINK_EFFICIENCY,
    Cluster,
    Work,
    curve,
    default_mfu,
    efficiency,
    step_of,
    traffic_of,
)
from tarflow_scale.capacity.tables import DECODED_BYTES_PER_SECOND
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.model import (
    DequantizationConfig,
    GlowConfig,
    IAFConfig,
    MAFConfig,
    ModelConfig,
    NICEConfig,
    RealNVPConfig,
    TarFlowConfig,
)
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.flows import build
from tarflow_scale.pages.pictures import HEIGHT, WIDTH
from tarflow_scale.records import PixelFormat
from tarflow_scale.training.reconstruction import ReconstructionObjective
from tarflow_scale.training.zero import model_size
from tests.conftest import TOP

RECIPES = TOP / "configs/train"
H100 = Cluster(card_named("h100"), 8, 50e9)
NOTHING = Footprint(0.0, 0.0)
PLAN = ["--gpus", "8", "--gpu", "h100"]


def parallelism(stage: int, **settings: Any) -> ParallelismConfig:
    return ParallelismConfig.model_validate({"zero_stage": stage, **settings})


def scenario(recipe: str, gpus: int, shape: tuple[int, int, int], classes: int | None, *overrides: str) -> Scenario:
    config = TrainConfig.load(RECIPES / f"{recipe}.yaml", list(overrides))
    with torch.device("meta"):
        size = model_size(build(config.model, shape, classes))
    mfu = default_mfu(config.parallelism)
    return Scenario(config.recipe, shape, size, training_flops(config.model, shape), H100, mfu, gpus)


# -- what autograd keeps -----------------------------------------------------------------------------------------

IMAGES = (3, 16, 16)
NO_LABELS = {"class_conditional": False}
FLOWS: dict[str, tuple[ModelConfig, tuple[int, ...], int]] = {
    "tarflow": (TarFlowConfig(patch_size=2, width=128, head_width=32, layers_per_block=(4, 4), **NO_LABELS), IMAGES, 4),
    "wide patches": (
        TarFlowConfig(
            patch_size=8, width=128, head_width=32, layers_per_block=(2, 4), log_scale_bound=3.0, **NO_LABELS
        ),
        (3, 64, 64),
        4,
    ),
    "starflow": (
        TarFlowConfig.model_validate(
            {"patch_size": 2, "layers_per_block": (2, 4), **NO_LABELS, "width": 64, "head_width": 32, "deep_width": 128}
            | {"scale": "softplus", "output_bound": 4.0, "start_token": True, "positions": "rotary", "final_norm": True}
        ),
        IMAGES,
        4,
    ),
    "grouped": (
        TarFlowConfig.model_validate(
            {"patch_size": 2, "layers_per_block": (4, 4), **NO_LABELS, "width": 128, "head_width": 32, "norm": "rms"}
            | {"mlp": "gated", "qk_norm": True, "queries_per_key": 2, "positions": "rotary"}
        ),
        IMAGES,
        4,
    ),
    "volume preserving": (
        TarFlowConfig(
            patch_size=8, width=128, head_width=32, layers_per_block=(2, 4), variant="volume_preserving", **NO_LABELS
        ),
        (3, 64, 64),
        4,
    ),
    "glow": (GlowConfig(levels=3, steps_per_level=4, width=64, **NO_LABELS), (3, 32, 32), 2),
    "additive": (GlowConfig(levels=2, steps_per_level=4, width=64, coupling="additive", **NO_LABELS), IMAGES, 4),
    "dense": (GlowConfig(levels=2, steps_per_level=4, width=64, convolution="dense", **NO_LABELS), IMAGES, 4),
    "realnvp": (RealNVPConfig(levels=2, width=32, residual_blocks=2, **NO_LABELS), IMAGES, 2),
    "realnvp of vectors": (RealNVPConfig(levels=2, width=64, **NO_LABELS), (8,), 256),
    "nice": (NICEConfig(width=300, **NO_LABELS), (1, 28, 28), 64),
    "maf": (MAFConfig(**NO_LABELS), (1, 16, 16), 32),
    "iaf": (IAFConfig(hidden_widths=(128, 128), transforms=2, **NO_LABELS), (1, 4, 4), 16),
    "learned noise": (NICEConfig(width=100, dequantization=DequantizationConfig(), **NO_LABELS), IMAGES, 16),
}  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With small layers, waiting for a second thread takes longer than computing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved_bytes(module: nn.Module, of: Callable[[torch.Tensor], object], x: torch.Tensor, bf16: bool) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, each counted once, without weights and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given out again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        _ = of(x)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("name", "bf16"),
    [(name, False) for name in FLOWS]
    + [(name, True) for name in ("tarflow", "starflow", "grouped", "wide patches", "glow")],
)
@pytest.mark.usefixtures("one_thread")
def test_activations_are_what_autograd_keeps(name: str, bf16: bool) -> None:
    config, shape, batch = FLOWS[name]
    torch.manual_seed(0)
    flow = build(config, shape).train()
    if len(shape) == 3:
        flow.pixels = PixelFormat(bit_depth=8, noise="uniform")
    x = torch.rand(batch, *shape) * 2 - 1
    flow.initialize(x)
    found: dict[str, int] = {}
    for how in flow.capabilities.activations:
        flow.activations = how
        found[how] = saved_bytes(flow, lambda x: flow(x, None, dequantize=True), x, bf16)
        casts = 2 * model_size(flow).low_precision if bf16 and how == "keep" else 0
        expected = activation_footprint(config, shape, batch, how, bf16).kept + casts
        assert expected == pytest.approx(found[how], rel=0.15), how
    assert found == dict(sorted(found.items(), key=lambda item: -item[1]))  # each kind keeps less than the one before


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("factor", [2, 8])
@pytest.mark.usefixtures("one_thread")
def test_activations_of_autoencoders_are_what_autograd_keeps(factor: int, bf16: bool) -> None:
    config, shape, batch = ConvolutionalConfig(factor=factor, latent_channels=4, width=16), (3, 32, 32), 4
    objective = ReconstructionObjective(build_autoencoder(config), shape, 8, 1.0, 0.0)
    images = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8)
    noise = torch.randn(batch, 4, 32 // factor, 32 // factor)
    saved = saved_bytes(objective, lambda images: objective(images, noise), images, bf16)
    casts = 2 * model_size(objective).low_precision if bf16 else 0
    expected = activation_footprint(config, shape, batch, "keep", bf16).kept + casts
    assert expected == pytest.approx(saved, rel=0.15)


def test_kept_activations_grow_with_the_batch() -> None:
    for config, shape, _ in FLOWS.values():
        one, two, four = (activation_footprint(config, shape, batch, "keep", bf16=False).kept for batch in (1, 2, 4))
        assert four - two == pytest.approx(2 * (two - one))


# -- bytes of a rank -----------------------------------------------------------------------------------------------


def test_sizes_of_a_model_on_meta_are_those_of_the_real_one() -> None:
    config = TarFlowConfig(patch_size=2, width=64, layers_per_block=(2, 1), class_conditional=True)
    with torch.device("meta"):
        on_meta = model_size(build(config, IMAGES, 10))
    tokens, width, features = 64, 64, 12
    layer = 12 * width**2 + 13 * width  # four maps of 3, 1, 4, 4 times C^2 with biases of 9 C, two norms of 2 C
    ends = features * width + width + 2 * features * width + 2 * features + (tokens + 10) * width
    assert on_meta.parameters == 3 * layer + 2 * ends == sum(p.numel() for p in build(config, IMAGES, 10).parameters())
    assert on_meta.low_precision == on_meta.parameters - 3 * 4 * width - 2 * (tokens + 10) * width


@pytest.mark.parametrize(
    ("stage", "offload", "held", "in_main"),
    [
        (0, "none", 12.5, 0), (1, "none", 6, 0), (2, "none", 6, 0), (3, "none", 3, 0),
        (1, "optimizer", 4, 2.5), (2, "optimizer", 4, 2.5), (3, "optimizer", 0.5, 2.5), (3, "all", 0, 3),
    ],
)  # fmt: skip
def test_what_is_held_is_the_table_of_the_section(stage: int, offload: str, held: float, in_main: float) -> None:
    # Of so many parameters that buckets do not count, with activations so large that no gradient is there with them.
    size, activations = ModelSize(10**14), Footprint(1e18, 0.0)
    memory = memory_of(size, activations, parallelism(stage, offload=offload), 1, Ranks(8, False, cuda=False))
    gathered = 4 * LIVE_ELEMENTS if stage == 3 else 0
    found = memory.total - memory.activations - gathered
    assert found / size.parameters == pytest.approx(held, abs=1e-4)
    assert memory.in_main / size.parameters == pytest.approx(in_main)


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulates", "cuda", "expected"),
    [
        # bytes a parameter of a billion at the worst moment, without activations; b: bytes of a bucket
        (0, 1, False, False, "16 + 0 * b"), (0, 8, False, False, "12.5 + 4 + 2 + 0 * b"),
        (1, 8, False, False, "6 + 4 + b"), (1, 8, False, True, "6 + 0.5 * 0.95 + 3 * b"),
        (1, 8, True, True, "6 + 4 * 0.95 + 3 * b"),
        (2, 8, False, True, "6 + 0.5 * 0.95 + 3 * b"), (2, 8, True, True, "6 + 0.5 + 0.5 * 0.95 + 3 * b"),
        (3, 8, False, True, "3 + b + 4 + b"),
    ],
)  # fmt: skip
def test_bytes_at_the_worst_moment(stage: int, ranks: int, accumulates: bool, cuda: bool, expected: str) -> None:
    size = ModelSize(10**9)
    memory = memory_of(size, NOTHING, parallelism(stage), 1, Ranks(ranks, accumulates, cuda))
    want = eval(expected, {"b": 4 * BUCKET_ELEMENTS / size.parameters}) * size.parameters
    want += 4 * size.parameters if (stage, ranks) == (0, 1) else 0  # one average on one rank
    assert memory.total - memory.context == pytest.approx(want)


def test_gradients_are_there_with_activations_only_where_they_accumulate() -> None:
    size, activations = ModelSize(10**8), Footprint(1e12, 0.0)
    once, several = (
        memory_of(size, activations, parallelism(0), 1, Ranks(1, accumulates, cuda=False))
        for accumulates in (False, True)
    )
    assert (once.gradients, several.gradients) == (0.0, 4e8)


# -- traffic and time ----------------------------------------------------------------------------------------------


def test_traffic_is_that_of_rings() -> None:
    size, share = ModelSize(10**8, low_precision=10**8), 7 / 8
    for stage, micro, precision, summed, gathered in (
        (0, 4, "fp32", 2 * 4, 0), (0, 4, "bf16", 2 * 4, 0),
        (1, 4, "fp32", 2 * 4, 4), (1, 4, "bf16", 2 * 2, 4),
        (2, 4, "fp32", 4 * 2 * 4, 4), (2, 1, "bf16", 2 * 2, 4),
        (3, 1, "fp32", 4, 4), (3, 4, "bf16", 4 * 2, 4 * 2),
    ):  # fmt: skip
        found = traffic_of(size, parallelism(stage, precision=precision), 8, micro)
        assert found.summed == pytest.approx(share * summed * 1e8), (stage, micro, precision)
        assert found.gathered == pytest.approx(share * gathered * 1e8), (stage, micro, precision)
    assert traffic_of(size, parallelism(2), 1, 1).total == 0
    twice = ModelSize(2 * LIVE_ELEMENTS)
    assert traffic_of(twice, parallelism(3), 8, 1).gathered == pytest.approx(2 * share * 4 * twice.parameters)


def test_a_step_is_passes_and_what_they_do_not_hide() -> None:
    size = ModelSize(BUCKET_ELEMENTS)  # one bucket
    work = Work(1e12, size, parallelism(0, precision="bf16"), 4)
    step = step_of(work, H100, 0.5, 8, 64)
    assert step.compute_seconds == pytest.approx(8 * 1e12 / (989.5e12 * 0.5))
    moving = 2 * 7 / 8 * 2e8 / (LINK_EFFICIENCY * 450e9) + 2 * 3 * LATENCY_SECONDS
    assert step.waiting_seconds == pytest.approx(moving)  # nothing hides it at stage 0
    hidden = step_of(Work(1e12, size, parallelism(3, precision="bf16"), 4), H100, 0.5, 8, 64)
    assert hidden.traffic_seconds > 0
    assert hidden.waiting_seconds == 0
    assert step_of(work, H100, 0.5, 1, 8).seconds == step_of(work, H100, 0.5, 1, 8).compute_seconds
    between = 16 * 2  # GPUs of four machines: the ring passes eight network cards of 50 GB/s
    assert H100.link(between) == pytest.approx(LINK_EFFICIENCY * 400e9)
    assert H100.link(8) == pytest.approx(LINK_EFFICIENCY * 450e9)


def test_utilisation_counts_no_recomputation() -> None:
    assert default_mfu(parallelism(2)) == 0.4
    assert default_mfu(parallelism(2, activations="checkpoint")) == pytest.approx(0.3)


def test_the_curve_is_sane() -> None:
    planned = scenario("imagenet64-conditional", 8, (3, 64, 64), 1000)
    points = curve(planned.work(planned.recipe), H100, 0.4, 256)
    assert [point.gpus for point in points] == [2**power for power in range(11)]
    alone = points[0].weak
    for before, after in itertools.pairwise(points):
        assert after.weak.images == 2 * before.weak.images
        assert before.weak.images_per_second < after.weak.images_per_second < 2.0001 * before.weak.images_per_second
        if after.strong is not None and before.strong is not None:
            assert after.strong.images == 256
            assert after.strong.images_per_second > before.strong.images_per_second
            # Once nothing accumulates, smaller shares hide less.
            if before.gpus >= 8:
                assert efficiency(after.strong, after.gpus, alone) < efficiency(before.strong, before.gpus, alone)
    assert [point.gpus for point in points if point.strong is None] == [512, 1024]
    assert all(0 < efficiency(point.weak, point.gpus, alone) <= 1 for point in points)


# -- advice --------------------------------------------------------------------------------------------------------


def test_the_stage_is_advised_that_fits_and_is_fast() -> None:
    planned = scenario("imagenet64-conditional", 8, (3, 64, 64), 1000)
    stages = by_stage(planned)
    assert [plan.stage for plan in stages] == [0, 1, 2, 3]
    assert [plan.fits for plan in stages] == [plan.memory.total <= USABLE * 80e9 for plan in stages]
    assert advice(planned, stages) == ["stage 2, as configured, fits and is about as fast as any other stage that fits"]
    spread = scenario("imagenet64-conditional", 64, (3, 64, 64), 1000, "training.micro_batch_size=4")
    (line,) = advice(spread, by_stage(spread))
    assert line.startswith("parallelism.zero_stage=3 (")  # it alone hides all of its traffic
    assert line.endswith("% more time per step")
    tight = scenario("deep-shallow-1024", 8, (3, 1024, 1024), 10, "parallelism.zero_stage=0")
    small = dataclasses.replace(tight, cluster=Cluster(card_named("v100"), 8, 12.5e9))
    (line,) = advice(small, by_stage(small))
    assert line.endswith("stage 0, as configured, does not fit")


def test_what_does_not_fit_is_told_what_would() -> None:
    planned = scenario("imagenet64-conditional", 8, (3, 64, 64), 1000, "training.micro_batch_size=128",
                  "training.global_batch_size=1024")  # fmt: skip
    stages = by_stage(planned)
    assert not any(plan.fits for plan in stages)
    lines = advice(planned, stages)
    assert lines[0].startswith("no stage fits")
    assert any("training.micro_batch_size=32 (" in line for line in lines)  # 64 do not fit, 32 do
    assert any("parallelism.activations=checkpoint" in line for line in lines)
    for line in lines[1:]:  # every one of them is true
        words = dict(word.split("=") for word in line.split("(")[0].split())
        config = TrainConfig.load(
            RECIPES / "imagenet64-conditional.yaml",
            ["training.micro_batch_size=128", "training.global_batch_size=1024",
             *(f"{key}={value}" for key, value in words.items())],
        )  # fmt: skip
        assert planned.memory(config.recipe).total <= USABLE * 80e9, line


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    planned = scenario("afhq256", 8, (3, 256, 256), 3)
    largest = largest_micro_batch(planned, planned.recipe)
    assert largest > 32
    for images, enough in ((largest, True), (largest + 1, False)):
        training = planned.recipe.training.model_copy(update={"micro_batch_size": images})
        memory = planned.memory(planned.recipe.model_copy(update={"training": training}))
        assert (memory.total <= USABLE * 80e9) == enough


def test_settings_that_do_not_go_together_are_no_variant() -> None:
    recipe = TrainConfig.load(RECIPES / "afhq256.yaml", []).recipe
    assert variant(recipe, {"parallelism.activations": "rebuild"}) is None
    changed = variant(recipe, {"parallelism.zero_stage": 3, "parallelism.offload": "all"})
    assert changed is not None
    assert changed.parallelism.offload == "all"


# -- cards ---------------------------------------------------------------------------------------------------------


def test_cards_are_known_by_both_names() -> None:
    for card in CARDS:
        assert card_named(card.name.upper()) is card
        assert card_of_device(f"NVIDIA {card.device}") is card
    assert card_of_device("NVIDIA H100 80GB HBM3") is card_named("h100")
    assert card_of_device("NVIDIA A100-SXM4-80GB") is card_named("a100")
    assert card_of_device("a toaster") is None


def test_decoding_rates_are_those_of_the_results() -> None:
    figures = json.loads((TOP / "evals/results/loader-cpu.json").read_text())["figures"]
    for codec, name, side in (("png", "png64", 64), ("jpeg", "jpeg512", 512)):
        measured = figures[f"images_per_second_{name}_ours_0"]["got"] * 3 * side**2
        assert DECODED_BYTES_PER_SECOND[codec] == pytest.approx(measured, rel=1e-3)


# -- the command ---------------------------------------------------------------------------------------------------


def test_a_plan_needs_neither_data_nor_gpu(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        str(RECIPES / "imagenet64-conditional.yaml"),
        *PLAN,
        "--image-size",
        "64",
        "--classes",
        "1000",
    ]
    picture = tmp_path / "curve.png"
    assert cli.main([*arguments, "--mfu", "0.4", "--price", "2", "--curve", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "466,286,784 parameters, for 3x64x64 (the flags)" in text
    flops = 3.0873e12 * 256233400  # the recipe's header says 7.9e20
    days = flops / (0.4 * 989.5e12) / 86400
    assert days == pytest.approx(23, abs=0.5)
    line = next(line for line in text.splitlines() if line.startswith("time"))
    assert float(line.split(";")[1].split("= ")[1].split()[0]) == pytest.approx(days, rel=0.05)
    assert "$" in text
    image = Image.open(io.BytesIO(picture.read_bytes()))
    assert (image.format, image.size) == ("PNG", (WIDTH, HEIGHT))
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(22, 60, 112), (190, 80, 20)} <= colours  # both curves are there
    assert cli.main(arguments) == 0
    assert "$" not in capsys.readouterr().out  # no price, no cost


def test_a_plan_reads_the_manifest_that_is_there(digits: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = [str(RECIPES / "digits.yaml"), f"data.path={digits}/train"]
    assert cli.main(["plan", *recipe, "--gpus", "2", "--gpu", "a100"]) == 0
    text = capsys.readouterr().out
    assert f"1x8x8 ({digits}/train)" in text
    assert "(png) per machine" in text
    assert "at most (the size without compression)" not in text


def test_a_plan_for_a_rectangle_counts_its_own_sides(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """32x128 has as many tokens as 64x64, so the model has as many parameters; a set on disk has its own size."""
    recipe = ["plan", str(RECIPES / "imagenet64-conditional.yaml"), *PLAN]
    assert cli.main([*recipe, "--image-size", "32x128", "--classes", "1000"]) == 0
    assert "466,286,784 parameters, for 3x32x128 (the flags)" in capsys.readouterr().out
    for number in range(4):
        path = tmp_path / f"images/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 6), (number, 0, 0)).save(path)
    pack = ["prepare", "source.kind=folder", f"source.path={tmp_path}/images", f"shards.path={tmp_path}/data"]
    assert cli.main([*pack, "split.test_fraction=0"]) == 0
    models: list[str] = []
    for flags in ([], ["--image-size", "6x10", "--classes", "2"]):
        capsys.readouterr()
        assert cli.main([*recipe, f"data.path={tmp_path}/data/train", *flags]) == 0
        models += [line for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
    assert models[0].endswith(f"for 3x6x10 ({tmp_path}/data/train)")
    assert models[0].partition(" (")[0] == models[1].partition(" (")[0]


def test_a_plan_for_a_crop_is_for_the_smaller_sides(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["plan", str(RECIPES / "imagenet64-conditional.yaml"), *PLAN, "data.augmentation.crop_pixels=[32,64]"]
    assert cli.main([*recipe, "--image-size", "48", "--classes", "1000"]) == 0
    assert "for 3x32x48 (the flags)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "plan: required section is missing; set its keys in the YAML or with --gpus GPUS"),
        (["--gpus", "8"], "plan.gpu: required key is missing"),
        (["--gpus", "8", "--gpu", "tpu"], "--gpu must be one of h200, h100-pcie, h100, "),
        (["--gpus", "0", "--gpu", "h100"], "plan.gpus: Input should be greater than or equal to 1 (got '0')"),
        (["--gpus", "many", "--gpu", "h100"], "plan.gpus: Input should be a valid integer"),
        ([*PLAN, "--mfu", "40"], "plan.mfu: Input should be less than or equal to 1 (got '40')"),
        (PLAN, "plan needs the data set data/imagenet64/train or its sizes (got neither); add --image-size PIXELS"),
        ([*PLAN, "--image-size", "64"], "model.class_conditional=true needs --classes with --image-size (got None)"),
        ([*PLAN, "--image-size", "65", "--classes", "9"], "must be multiples of model.patch_size"),
        ([*PLAN, "--image-size", "64x65", "--classes", "9"], "must be multiples of model.patch_size"),
        (
            [*PLAN, "--image-size", "64x", "--classes", "9"],
            "plan.image_size: a size must be a number of pixels, at least 1, or a height and a width, such as 192x128 "
            "(got '64x')",
        ),
        (
            ["--gpus", "64", "--gpu", "h100", "--image-size", "64", "--classes", "9"],
            "(got 256 and 32 x 64 = 2048); use training.global_batch_size=2048, or training.micro_batch_size=4",
        ),
        (
            ["--gpus", "3", "--gpu", "h100", "--image-size", "64", "--classes", "9"],
            "32 x 3 = 96); use training.global_batch_size=288",
        ),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(RECIPES / "imagenet64-conditional.yaml"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_result_on_file_holds_what_was_asked() -> None:
    figures = json.loads((TOP / "evals/results/capacity-cpu.json").read_text())["figures"]
    ratios = {name: figure["got"] for name, figure in figures.items() if name.endswith("_memory")}
    assert len(ratios) >= 3
    assert all(math.isclose(ratio, 1, abs_tol=0.15) for ratio in ratios.values()), ratios
