"""Verb ``plan``: memory, speed and cost of a recipe on GPUs, computed without a GPU.

It reads only the manifest of the data set. With ``--image-size`` and ``--classes`` it needs no data set, so a run can
be planned before its data are packed. The arithmetic is in `tarflow_scale.capacity`.
"""

import math

from tarflow_scale import storage
from tarflow_scale.capacity.advice import Scenario, by_stage
from tarflow_scale.capacity.flops import training_flops
from tarflow_scale.capacity.gpus import card_named
from tarflow_scale.capacity.steps import Cluster, curve, default_mfu, efficiency
from tarflow_scale.capacity.tables import Answer, Sizes, print_answer
from tarflow_scale.config.autoencoder import ConvolutionalConfig, TunedDecoderConfig
from tarflow_scale.config.data import DataConfig, height_and_width
from tarflow_scale.config.model import FlowConfig
from tarflow_scale.config.plan import GpusConfig, PlanConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.pages.pictures import Panel, panels_png
from tarflow_scale.shards.manifest import MANIFEST_NAME, read_manifest
from tarflow_scale.training.construction import seen_by_model, size_of
from tarflow_scale.training.zero import deepspeed_config

__all__ = ["run"]

_GB = 1e9


def run(config: PlanConfig, dry_run: bool) -> None:
    """Print the plan. If ``plan.curve`` is set, draw the scaling curve into this file.

    Raises:
        ConfigError: settings contradict each other, or the batch does not divide among the GPUs.
        DataError: the manifest cannot be read.
    """
    asked, recipe = config.plan, config.recipe
    card = card_named(asked.gpu)
    network = card.network_bytes_per_second if asked.network is None else asked.network * _GB
    cluster = Cluster(card, asked.gpus_per_node, network)
    model = recipe.model
    assert not isinstance(model, TunedDecoderConfig)
    sizes = _sizes(asked, config.data, model)
    deepspeed_config(recipe.optimizer, recipe.training, recipe.parallelism, sizes.model.parameters, asked.gpus)
    flops = training_flops(model, sizes.event_shape)
    mfu = asked.mfu or default_mfu(recipe.parallelism)
    scenario = Scenario(recipe, sizes.event_shape, sizes.model, flops, cluster, mfu, asked.gpus)
    points = curve(scenario.work(recipe), cluster, mfu, recipe.training.global_batch_size)
    answer = Answer(scenario, sizes, by_stage(scenario), points, asked.price, asked.mfu is not None)
    print_answer(answer)
    if asked.curve is not None and not dry_run:
        storage.write_bytes(asked.curve, _drawn(answer))
        print(f"wrote {asked.curve}")


def _sizes(asked: GpusConfig, data: DataConfig, model: FlowConfig | ConvolutionalConfig) -> Sizes:
    """Sizes of the images and the model, from the flags if ``--image-size`` is given, else from the manifest."""
    crop = data.augmentation.crop_pixels
    if asked.image_size is not None:
        if isinstance(model, FlowConfig) and model.class_conditional and not asked.classes:
            raise ConfigError(
                f"model.class_conditional=true needs --classes with --image-size (got {asked.classes}); add --classes "
                f"NUMBER, or set model.class_conditional=false"
            )
        height, width = height_and_width(asked.image_size)
        rows, columns = height_and_width(crop or asked.image_size)
        shape = (asked.channels, min(rows, height), min(columns, width))
        stored = asked.channels * height * width
        return Sizes(shape, size_of(model, shape, asked.classes or None), stored, None, None, "the flags")
    if not storage.exists(storage.join(data.path, MANIFEST_NAME)):
        raise ConfigError(
            f"plan needs the data set {data.path} or its sizes (got neither); add --image-size PIXELS or "
            f"HEIGHTxWIDTH, --classes NUMBER (0 for none), and --channels NUMBER if it is not 3"
        )
    manifest = read_manifest(data.path)
    seen = seen_by_model(manifest, crop)
    packed = sum(shard.bytes for shard in manifest.shards) / manifest.num_images
    decoded = math.prod(manifest.event.carried_shape)
    size = size_of(model, seen.event.shape, seen.num_classes or None, seen.event.num_conditions)
    return Sizes(seen.event.shape, size, decoded, packed, manifest.codec, data.path)


def _drawn(answer: Answer) -> bytes:
    scenario, alone = answer.scenario, answer.points[0].weak
    weak = [(float(point.gpus), point.weak) for point in answer.points]
    strong = [(float(point.gpus), point.strong) for point in answer.points if point.strong is not None]
    grown = "weak scaling: one micro batch per GPU"
    fixed = f"strong scaling: global batch {scenario.recipe.training.global_batch_size:,}"
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
        Panel("images per second", rates, "GPUs", logarithmic=True),
        Panel("images per second per GPU, relative to one GPU", shares, "GPUs", logarithmic=False),
    ]
    cluster, parallelism = scenario.cluster, scenario.recipe.parallelism
    heading = (
        f"{scenario.recipe.model.kind}, {scenario.size.parameters / 1e6:,.0f} M parameters, ZeRO stage "
        f"{parallelism.zero_stage}, {parallelism.precision}; {cluster.card.name}, {cluster.gpus_per_node} per machine, "
        f"network {cluster.network_bytes_per_second / _GB:g} GB/s per GPU; assumed MFU {scenario.mfu:.0%}"
    )
    return panels_png(panels, heading)
