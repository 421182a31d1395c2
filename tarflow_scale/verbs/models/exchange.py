"""Verb ``models``: ``export`` writes a version as a folder in the Hugging Face layout, and ``import`` reads it.

The folder contains ``model.safetensors``, ``config.json``, ``README.md`` (the model card), ``samples.png`` (from a
report, or drawn for the card) and ``version.json``, which contains the registry's record of the version and is written
last. An import checks all files before it stores any: the weights must be safetensors with the recorded digest, never a
pickle, and file names must not lead out of the folder.

``export`` writes to ``command.path``, a folder or URL that must be empty or absent; ``import`` reads it and registers
the version as ``registry.model``. A version that is imported twice is registered only once. If an import is killed,
repeat it.
"""

import json
import warnings
from typing import Any

from pydantic import Field

from tarflow_scale import storage
from tarflow_scale.autoencoders.stored import AUTOENCODER_FILES
from tarflow_scale.config.models import BrowseConfig, CommandConfig, ModelsConfig
from tarflow_scale.config.sampling import SamplingConfig
from tarflow_scale.errors import ConfigError, DataError, NumericsError
from tarflow_scale.flows.weights import CONFIG_NAME, WEIGHTS_NAME, flow_from_files
from tarflow_scale.loading import EXPORTED, attach_renderer
from tarflow_scale.pages.markdown import cell
from tarflow_scale.pages.numbers import decimals_of, fixed
from tarflow_scale.records import MetricsReport, MetricValue, ModelVersion, Record
from tarflow_scale.registry import ModelState, Registry, resolve
from tarflow_scale.runtime.distributed import own_device
from tarflow_scale.sampling import Sampler
from tarflow_scale.shards.events import event_of
from tarflow_scale.shards.images import contact_sheet

__all__ = ["export_version", "import_version"]

_VERSION, _CARD, _SAMPLES, _CONFIGURATION = EXPORTED, "README.md", "samples.png", "training.json"
_FORMAT = 1
_COLUMNS, _MOST_COLUMNS, _MOST_SAMPLES = 8, 20, 40
"""Layout of the samples of a model card: usual number of columns, maximum number of columns if each column shows one
class, and maximum number of samples."""
_MOST_HEADER_BYTES = 100 * 1024**2
"""The longest header that the safetensors library reads."""


class _ExportedVersion(Record):
    """Content of ``version.json``."""

    format: int = Field(ge=1, le=_FORMAT)
    model: str
    version: ModelVersion
    reports: tuple[MetricsReport, ...]


def export_version(config: ModelsConfig, dry_run: bool) -> None:
    """Write a version to a folder or URL (``command.path``), which must be empty or absent.

    Raises:
        ConfigError: no path or no model is given.
        DataError: the folder contains files, or the version is an autoencoder.
        RegistryError: the version does not exist, or one of its files is damaged.
    """
    path, model = _path_and_model(config.registry, config.command)
    registry = Registry(config.registry.path, model)
    state = registry.state()
    version = resolve(state, config.registry.version, model)
    if storage.list_names(path):
        raise DataError(
            f"command.path must be a new or empty folder (got files in {path}); choose another command.path"
        )
    data, reports = version.trained_on, state.reports.get(version.version, [])
    if dry_run:
        print(f"dry run: would write {model}@{version.version} with {len(reports)} reports to {path}")
        return
    files = registry.read_files(version)
    grid = next((report.grid for report in reversed(reports) if report.grid is not None), None)
    drawn = registry.read("samples", grid) if grid is not None else None
    if drawn is None and config.command.samples and data.vectors is None:
        drawn = _drawn_samples(files, version)
    if drawn is not None:
        files[_SAMPLES] = drawn
    if version.configuration is not None:
        files[_CONFIGURATION] = registry.read("configuration", version.configuration)
    given: int = json.loads(files[CONFIG_NAME]).get("num_conditions", 0)
    files[_CARD] = _card(model, version, state, config.command.licence, drawn is not None, given).encode()
    known = tuple(_portable(report) for report in reports)
    files[_VERSION] = _ExportedVersion(format=_FORMAT, model=model, version=version, reports=known).to_json()
    for name, content in files.items():  # version.json last: without it the folder is not an exported version
        storage.write_bytes(storage.join(path, name), content)
    print(f"{path}: {model}@{version.version}, {', '.join(files)}")


def import_version(config: ModelsConfig, dry_run: bool) -> None:
    """Import the version at ``command.path`` (a folder or URL) with its reports; register it as ``registry.model``.

    Raises:
        ConfigError: no path or no model is given.
        DataError: the folder contains no exported version, or a file is damaged or has the wrong format.
    """
    path, model = _path_and_model(config.registry, config.command)
    location = storage.join(path, _VERSION)
    content = storage.read_if_there(location)
    if content is None:
        raise DataError(
            f"{path} is not an exported version (no {_VERSION}); for weights of apple/ml-tarflow use the verb convert"
        )
    exported = _ExportedVersion.from_json(content, location, DataError)
    version, files = exported.version, _files(path, exported.version)
    flow = flow_from_files(files, path)
    attach_renderer(flow, files, path)
    print(f"{path}: {exported.model}@{version.version}, {type(flow).__name__} of {version.parameters:,} parameters")
    if dry_run:
        print(f"dry run: would import {path} as a version of {model}")
        return
    configuration = None
    if version.configuration is not None:
        configuration = storage.read_bytes(storage.join(path, _CONFIGURATION))
        if storage.digest(configuration) != version.configuration.sha256:
            raise DataError(f"{path}/{_CONFIGURATION} does not match its digest; copy the folder again")
    registry = Registry(config.registry.path, model)
    fields = version.model_dump(mode="json", exclude={"version", "files", "configuration"})
    origin = config.command.reason or f"imported from {path}, there {exported.model}@{version.version}"
    registered = registry.register(files, fields, origin, configuration)
    present = [_portable(report) for report in registry.state().reports.get(registered.version, [])]
    for report in exported.reports:
        own = _portable(report).model_copy(update={"model": model, "version": registered.version})
        if own not in present:
            registry.attach_report(own, origin)
    print(
        f"imported {path} as {model}@{registered.version} in {config.registry.path}, with {len(exported.reports)} "
        f"reports"
    )


def _drawn_samples(files: dict[str, bytes], version: ModelVersion) -> bytes | None:
    """Draw samples with seed 0. With 2 to 20 classes, each column shows one class. Returns None if sampling fails."""
    names = version.trained_on.class_names
    columns = len(names) if 1 < len(names) <= _MOST_COLUMNS else _COLUMNS
    num = max(1, _MOST_SAMPLES // columns) * columns
    print(f"no report has samples, so {num} are drawn for the model card (seed 0); command.samples=false skips this")
    flow = flow_from_files(files, "the version").to(own_device()).eval()
    attach_renderer(flow, files, "the version")
    try:
        images = Sampler(flow, 0, SamplingConfig(batch_size=None)).images(range(num)).numpy()
    except (ConfigError, NumericsError) as error:  # a model can be shared without samples
        warnings.warn(f"the model card has no samples: {error}", stacklevel=2)
        return None
    labels = [names[i % len(names)] for i in range(num)] if flow.num_classes == len(names) else None
    return contact_sheet(images, columns, max(1, 256 // (_COLUMNS * images.shape[-1])), labels)


def _path_and_model(browsed: BrowseConfig, command: CommandConfig) -> tuple[str, str]:
    """Path of the exported version (folder or URL), and name of the model, from the configuration."""
    if command.path is None:
        raise ConfigError("command.path must be the folder or URL of the exported version (got none); set command.path")
    if browsed.model is None:
        raise ConfigError("export and import need the name of a model (got none); set registry.model")
    return command.path, browsed.model


def _portable(report: MetricsReport) -> MetricsReport:
    """Copy the report without references to files that exist only in its registry."""
    metrics = {name: metric.model_copy(update={"per_image": None}) for name, metric in report.metrics.items()}
    return report.model_copy(update={"grid": None, "metrics": metrics})


def _files(path: str, version: ModelVersion) -> dict[str, bytes]:
    """Read the files of the flow, and check them against the exported record."""
    if set(version.files) - set(AUTOENCODER_FILES) != {WEIGHTS_NAME, CONFIG_NAME}:
        raise DataError(
            f"{path}/{_VERSION} must list {WEIGHTS_NAME} and {CONFIG_NAME} (got {', '.join(version.files)}); export "
            f"the version again"
        )
    files: dict[str, bytes] = {}
    for name, record in version.files.items():
        content = storage.read_bytes(storage.join(path, name))
        if name == WEIGHTS_NAME:
            _check_safetensors(f"{path}/{name}", content)
        if storage.digest(content) != record.sha256:
            raise DataError(f"{path}/{name} does not match its digest; copy the folder again")
        files[name] = content
    return files


def _check_safetensors(location: str, content: bytes) -> None:
    if content.startswith((b"PK", b"\x80")):
        raise DataError(f"{location} is a pickle, which is never read; convert it to safetensors with the verb convert")
    length = int.from_bytes(content[:8], "little")
    if length > min(_MOST_HEADER_BYTES, max(0, len(content) - 8)):
        raise DataError(
            f"{location} has an impossible header of {length} bytes (the file has {len(content)} bytes); the file is "
            f"damaged or malicious: get it again from its source"
        )
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location} is not a safetensors file ({error}); export the version again") from error
    if not isinstance(header, dict):
        raise DataError(f"{location} is not a safetensors file (its header is not an object); export the version again")


# -- the model card ----------------------------------------------------------------------------------------------------


_TASKS = {"images": "unconditional-image-generation", "vectors": "tabular-density-estimation"}
"""Task name that model hubs give to a model, by kind of data."""


def _card(model: str, version: ModelVersion, state: ModelState, licence: str, has_samples: bool, given: int) -> str:
    """The model card: Markdown with the metadata that model hubs read. ``given`` is the number of condition values."""
    newest = {
        metric.protocol_id: metric
        for report in state.reports.get(version.version, [])
        for metric in report.metrics.values()
    }
    data = version.trained_on
    event = event_of(data, version.pixels.bit_depth)
    noun = event.shown.noun
    lines = [
        "---",
        f"license: {licence}",
        "library_name: tarflow-scale",
        *([f"pipeline_tag: {_TASKS[noun]}"] if noun == "images" else []),  # the only task that hubs list
        "tags: [normalizing-flow, tarflow-scale]",
        *_index(model, version, _TASKS[noun], list(newest.values())),
        "---",
        "",
        f"# {model}@{version.version}",
        "",
        f"A normalizing flow of {event} with "
        f"{version.parameters:,} parameters, trained on {data.name}/{data.split} ({data.num_images:,} {noun}"
        + (f", {data.num_classes} classes" if data.class_names else "")
        + (f") for {version.images_seen:,} {noun}" if version.images_seen is not None else ")")
        + ".",
        "",
    ]
    if has_samples:
        named = ", with their classes" if data.class_names else ""
        lines += [f"![Samples{named}]({_SAMPLES})", ""]
    if data.class_names:
        classes = ", ".join(f"{label} {cell(name)}" for label, name in enumerate(data.class_names))
        lines += [f"Labels and what they stand for: {classes}.", ""]
    if newest:
        lines += [f"| number | value | standard error | unit | {noun} | protocol id |", "|---|---|---|---|---|---|"]
        for metric in newest.values():
            numbers = (metric.value, metric.standard_error)
            value, error = ("" if number is None else fixed(number, decimals_of(metric.value)) for number in numbers)
            lines.append(
                f"| {metric.protocol} | {value} | {error} | {metric.unit} | {metric.num_images:,} | "
                f"`{metric.protocol_id[:12]}` |"
            )
        lines += ["", "Numbers of different protocol ids are not comparable.", ""]
    lines += [
        "```python",
        *(["import torch", ""] if given else []),
        "from tarflow_scale import load",
        "",
        'flow = load("PATH_OF_THIS_FOLDER")',
        f"flow.sample(16, torch.zeros(16, {given}), seed=0)" if given else "flow.sample(16, seed=0)",
        "```",
        "",
        "| where it came from | |",
        "|---|---|",
        f"| weights | `{version.weights_digest}` |",
        f"| data manifest | `{data.digest}` |",
        f"| configuration | `{version.config_digest}` |",
        f"| code | `{version.git_commit}` |",
        f"| packages | {', '.join(f'{name} {package}' for name, package in version.packages.items())} |",
        "",
    ]
    return "\n".join(lines)


def _index(model: str, version: ModelVersion, task: str, metrics: list[MetricValue]) -> list[str]:
    """The metrics in the format that model hubs index. They are written as JSON, which is also valid YAML."""
    if not metrics:
        return []
    results: list[dict[str, Any]] = [
        {
            "task": {"type": task},
            "dataset": {"name": version.trained_on.name, "type": version.trained_on.name},
            "metrics": [{"name": metric.protocol, "type": metric.unit, "value": metric.value} for metric in metrics],
        }
    ]
    return [f"model-index: {json.dumps([{'name': model, 'results': results}])}"]
