"""Verb ``train``: train a flow or an autoencoder on shards and register it.

Open the data, build the model, start DeepSpeed, train from the latest checkpoint to the configured number of images,
export the averaged weights and register them. The same command continues a run that stopped. To use several ranks,
start it with torchrun; see ``launch/``.

Reads ``<data.path>`` (and ``data.mix``). Writes the run folder ``logging.path``: ``config.yaml`` (if a run continues
with other settings, the old file becomes ``config-until-IMAGES.yaml``), ``environment.json``, ``status.json``,
``log.jsonl``, ``curve.png`` (the loss), ``checkpoints/``, ``previews/``, ``quarantine-*.jsonl`` of corrupt samples, and
at the end ``model/``, which is also registered as ``registry.model``.

It is an error if the folder belongs to another run, if its run is still active, or if the global batch cannot be split
among ranks and micro batches. A run that receives a stop signal saves a checkpoint and ends with exit code 75. A killed
run loses the steps after its latest complete checkpoint; on the same number of ranks, repeating them gives the same
weights.
"""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

import torch

from tarflow_scale import storage
from tarflow_scale.capacity.flops import tokens_per_image, training_flops
from tarflow_scale.config.data import DataConfig
from tarflow_scale.config.train import CheckpointConfig, LoggingConfig, Recipe, TrainConfig
from tarflow_scale.errors import Interrupted, UserError
from tarflow_scale.pages.runs import CURVE_NAME, CurveFile
from tarflow_scale.records import canonical_json
from tarflow_scale.runtime import distributed
from tarflow_scale.runtime.processes import exclusive
from tarflow_scale.shards.loader import Loader
from tarflow_scale.shards.mix import Mix
from tarflow_scale.training import run_log
from tarflow_scale.training.course import Course
from tarflow_scale.training.ema import WeightAverages
from tarflow_scale.training.engine import Engine, start_process_group
from tarflow_scale.training.folder import STOP_SECONDS, check_shared, describe_run, follow_launcher
from tarflow_scale.training.loop import Loop
from tarflow_scale.training.meter import Meter, peak_flops_of
from tarflow_scale.training.progress import Progress
from tarflow_scale.training.zero import deepspeed_config
from tarflow_scale.verbs.train.identity import identity_of
from tarflow_scale.verbs.train.inputs import Inputs, open_inputs
from tarflow_scale.verbs.train.overview import print_overview
from tarflow_scale.verbs.train.preview import preview_of
from tarflow_scale.verbs.train.publish import Publication
from tarflow_scale.verbs.train.subject import Subject

__all__ = ["run"]


def run(config: TrainConfig, dry_run: bool) -> None:
    """Train the model, export it and register it.

    Raises:
        UserError: the data set, the batch sizes or the run folder do not fit the configuration.
        Interrupted: the run was asked to stop and can continue.
    """
    data, logging, recipe = config.data, config.logging, config.recipe
    inputs = open_inputs(data, config.validation, recipe, logging, config.autoencoder)
    subject, ranks = inputs.subject, distributed.world_size()
    deepspeed_config(recipe.optimizer, recipe.training, recipe.parallelism, subject.size.parameters, ranks)
    run_log.check_log_packages(logging.tensorboard, logging.wandb_project)
    course = Course(
        logging.path,
        config.checkpoint.upload_path,
        recipe.training,
        config.schedule,
        recipe.optimizer.peak_lr,
        identity_of(inputs.mix, data, recipe, subject.identity),
    )
    latest = course.latest(reads_files=False)
    if distributed.is_main():
        output = f"{logging.path}, registry {config.registry.path}"
        print_overview(recipe, inputs, data.shuffle_block, course.begins(latest), output)
    if dry_run:
        if latest is not None and (line := course.rate_change(latest[1])):
            _say(line)
        return

    publication = Publication(
        logging.path,
        config.registry,
        inputs.mix.manifest.facts().model_copy(update={"image_size_pixels": inputs.manifest.image_size_pixels}),
        recipe.training.ema_half_life_images[0],
        config.model_dump(mode="json"),
        subject,
    )
    follow_launcher()
    if ranks > 1:
        _say(f"waiting for all {ranks} ranks")
    device = start_process_group(recipe.training.threads)
    check_shared(logging.path, device)
    with ExitStack() as held:
        distributed.from_main(lambda: held.enter_context(exclusive(storage.local(logging.path), STOP_SECONDS)))
        _train(recipe, data, config.checkpoint, logging, inputs, course, publication, device)
    distributed.barrier()
    distributed.shut_down()


def _train(
    recipe: Recipe,
    data: DataConfig,
    checkpoint: CheckpointConfig,
    logging: LoggingConfig,
    inputs: Inputs,
    course: Course,
    publication: Publication,
    device: torch.device,
) -> None:
    training, subject = recipe.training, inputs.subject
    torch.manual_seed(training.seed)
    objective = subject.objective().to(device)
    reader = _loader(inputs.mix, data, training.seed, logging.path, device)
    _say("initializing the model on the first images; a checkpoint, if there is one, replaces the result")
    objective.initialize(reader.first(), training.micro_batch_size, training.seed, device)
    distributed.broadcast_module(objective)
    _say("starting DeepSpeed")
    engine = Engine(objective, device, recipe.optimizer, training, recipe.parallelism)
    loop = Loop(
        engine=engine,
        averages=WeightAverages(engine, training.ema_half_life_images),
        reader=reader,
        course=course,
        training=training,
        checkpoints=checkpoint,
        logging=logging,
        validation=inputs.validation,
        meter=_meter(subject, inputs.manifest.event.shape, logging.peak_flops or peak_flops_of(device)),
        preview=preview_of(subject, logging.path),
    )
    progress = loop.resume()
    _say(_next_steps(logging, progress.images_seen, course.total_images))
    with _recorded(logging, publication.configuration, progress, course.total_images) as log:
        loop.fit(progress, log)
    _say("exporting the averaged weights and registering them")
    for half_life in reversed(training.ema_half_life_images):
        weights = loop.averaged_weights(half_life)
        if distributed.is_main():
            publication.publish(weights, half_life, progress.images_seen, device)


def _meter(subject: Subject, shape: tuple[int, ...], peak_flops: float | None) -> Meter:
    """A meter; it reports no utilisation if the operations of a step are not known."""
    counted, ranks = subject.counted, distributed.world_size()
    if counted is None:
        return Meter(0.0, None, None, ranks)
    return Meter(training_flops(counted, shape), tokens_per_image(counted, shape), peak_flops, ranks)


def _say(text: str) -> None:
    """Print a line on rank 0."""
    if distributed.is_main():
        print(text)


def _next_steps(logging: LoggingConfig, images_seen: int, total_images: int) -> str:
    path, seen = logging.path, f"{images_seen:,} images"
    if images_seen >= total_images:
        return f"nothing to train: the run in {path} has seen all {seen}"
    begins = f"continuing after {seen}" if images_seen else "training begins"
    return (
        f"{begins}: up to {total_images:,}; figures every {logging.every_images:,} images in {path}/log.jsonl, "
        f"{path}/{CURVE_NAME} shows the loss; Ctrl-C saves a checkpoint and stops"
    )


@contextmanager
def _recorded(
    logging: LoggingConfig, resolved: dict[str, Any], progress: Progress, total_images: int
) -> Generator[run_log.Log]:
    """On rank 0, write settings, log and status into the run folder; yields the function that writes to the log."""
    if not distributed.is_main():
        yield lambda record: None
        return
    describe_run(logging.path, resolved, progress.images_seen)

    def status(state: str, reason: str = "") -> None:
        record = {"state": state, "images_seen": progress.images_seen, "total_images": total_images, "reason": reason}
        record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        storage.write_bytes(f"{logging.path}/status.json", canonical_json(record))

    status("running")
    try:
        folder, project = storage.local(logging.path), logging.wandb_project
        with (
            run_log.open_log(folder, progress.images_seen, logging.tensorboard, project, resolved) as log,
            CurveFile(logging.path) as curve,  # reads the log
        ):

            def write(record: Mapping[str, Any]) -> None:
                log(record)
                curve.take(record)

            yield write
    except Interrupted as error:
        status("stopped", str(error))
        raise
    except Exception as error:
        status("failed", str(error) if isinstance(error, UserError) else repr(error))
        raise
    status("finished")


def _loader(mix: Mix, data: DataConfig, seed: int, path: str, device: torch.device) -> Loader:
    """A loader that reads this rank's share of every global batch."""
    rank, share = distributed.rank(), mix.num_slots // distributed.world_size()
    return Loader(
        mix=mix,
        slots=range(rank * share, (rank + 1) * share),
        config=data,
        seed=seed,
        quarantine_path=str(storage.local(path) / f"quarantine-{rank:05d}.jsonl"),
        pin_memory=device.type == "cuda",
    )
