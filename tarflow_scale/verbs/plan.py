"""``train CONFIG --plan``: what a recipe needs of GPUs, how fast it will be and what it costs, before there are any.

Nothing is opened but the manifest of the data set, and not even that where ``--image-size`` and ``--classes`` say what
it would: one plans before the data are packed. The arithmetic is in `tarflow_scale.capacity.memory`, ``capacity`` and
``advice``; this module asks it and prints.
"""

import torch
from pydantic import ConfigDict, Field

from tarflow_scale import storage
from tarflow_scale.capacity.advice import Job, by_stage
from tarflow_scale.capacity.flops import training_flops
from tarflow_scale.capacity.gpus import card_named
from tarflow_scale.capacity.steps import Cluster, curve, default_mfu, efficiency
from tarflow_scale.capacity.tables import Answer, Facts, print_answer
from tarflow_scale.config.base import Section, validated
from tarflow_scale.config.train import TrainConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import build
from tarflow_scale.pages.pictures import Panel, panels_png
from tarflow_scale.shards.manifest import MANIFEST_NAME, read_manifest
from tarflow_scale.training.model import flow_of, seen_by_model
from tarflow_scale.training.zero import deepspeed_config, model_size

__all__ = ["Question", "run"]

_GB = 1e9


class Question(Section):
    """What the flags of ``--plan`` say; the command line has their meaning."""

    model_config = ConfigDict(alias_generator=lambda name: f"--{name.replace('_', '-')}")

    gpus: int = Field(ge=1, le=65536)
    gpu: str
    gpus_per_node: int = Field(default=8, ge=1)
    network: float | None = Field(default=None, gt=0)
    mfu: float | None = Field(default=None, gt=0, le=1)
    price: float | None = Field(default=None, gt=0)
    curve: str | None = None
    image_size: int | None = Field(default=None, ge=1)
    channels: int = Field(default=3, ge=1)
    classes: int | None = Field(default=None, ge=0)


def run(config: TrainConfig, flags: dict[str, str]) -> None:
    """Print the plan, and draw its curve if asked to.

    Args:
        config: the recipe.
        flags: what was given, by flag.

    Raises:
        ConfigError: flags that are missing or make no sense, or a batch that does not divide among the GPUs.
        DataError: the manifest that is there cannot be read.
    """
    missing = [flag for flag in ("--gpus", "--gpu") if flag not in flags]
    if missing:
        raise ConfigError(f"--plan needs --gpus and --gpu (got no {' and no '.join(missing)}); add --gpus 8 --gpu h100")
    question = validated(Question, dict(flags))
    card = card_named(question.gpu)
    network = card.network_bytes_per_second if question.network is None else question.network * _GB
    cluster = Cluster(card, question.gpus_per_node, network)
    facts = _facts(config, question)
    deepspeed_config(config.optimizer, config.training, config.parallelism, facts.size.parameters, question.gpus)
    flops = training_flops(config.model, facts.event_shape)
    mfu = question.mfu or default_mfu(config.parallelism)
    job = Job(config, facts.event_shape, facts.size, flops, cluster, mfu, question.gpus)
    points = curve(job.work(config), cluster, mfu, config.training.global_batch_size)
    answer = Answer(job, facts, by_stage(job), points, question.price, question.mfu is not None)
    print_answer(answer)
    if question.curve is not None:
        storage.write_bytes(question.curve, _drawn(answer))
        print(f"wrote {question.curve}")


def _facts(config: TrainConfig, question: Question) -> Facts:
    """What the model sees: from the flags, else from the manifest."""
    crop = config.data.augmentation.crop_pixels
    if question.image_size is not None:
        if config.model.class_conditional and not question.classes:
            raise ConfigError(
                f"model.class_conditional needs --classes beside --image-size (got {question.classes}); add it, or "
                f"model.class_conditional=false"
            )
        side = min(crop or question.image_size, question.image_size)
        shape = (question.channels, side, side)
        with torch.device("meta"):
            flow = build(config.model, shape, question.classes or None)
        stored = question.channels * question.image_size**2
        return Facts(shape, model_size(flow), stored, None, None, "the flags")
    if not storage.exists(storage.join(config.data.path, MANIFEST_NAME)):
        raise ConfigError(
            f"--plan needs the data set {config.data.path} or its sizes (got neither); add --image-size 256 "
            f"--classes 1000, with --channels if not 3"
        )
    manifest = read_manifest(config.data.path)
    seen = seen_by_model(manifest, crop)
    with torch.device("meta"):
        flow = flow_of(config.model, seen)
    packed = sum(shard.bytes for shard in manifest.shards) / manifest.num_images
    channels, rows, columns = manifest.stored_shape
    codec = None if manifest.vectors else manifest.codec
    return Facts(seen.event_shape, model_size(flow), channels * rows * columns, packed, codec, config.data.path)


def _drawn(answer: Answer) -> bytes:
    alone = answer.points[0].weak
    weak = [(float(point.gpus), point.weak) for point in answer.points]
    strong = [(float(point.gpus), point.strong) for point in answer.points if point.strong is not None]
    grown = "weak: a micro batch each"
    fixed = f"strong: global batch {answer.job.config.training.global_batch_size:,}"
    rates = {
        "ideal": [(gpus, gpus * alone.images_per_second) for gpus, _ in weak],
        grown: [(gpus, step.images_per_second) for gpus, step in weak],
        fixed: [(gpus, step.images_per_second) for gpus, step in strong],
    }
    shares = {
        "ideal": [(gpus, 1.0) for gpus, _ in weak],
        grown: [(gpus, efficiency(step, round(gpus), alone)) for gpus, step in weak],
        fixed: [(gpus, efficiency(step, round(gpus), alone)) for gpus, step in strong],
    }
    panels = [
        Panel("images a second", rates, "GPUs", logarithmic=True),
        Panel("of one GPU's images a second, each", shares, "GPUs", logarithmic=False),
    ]
    cluster, parallelism = answer.job.cluster, answer.job.config.parallelism
    heading = (
        f"{answer.job.config.model.kind}, {answer.job.size.parameters / 1e6:,.0f} M parameters, ZeRO stage "
        f"{parallelism.zero_stage}, {parallelism.precision}; {cluster.card.name}, {cluster.gpus_per_node} a machine, "
        f"{cluster.network_bytes_per_second / _GB:g} GB/s a GPU between; MFU {answer.job.mfu:.0%} assumed"
    )
    return panels_png(panels, heading)
