"""Verb ``convert``: turn an apple/ml-tarflow ``.pth`` file into a saved flow, and register it if a registry is set.

Read the tensors without running code, infer all sizes, rename the tensors, and write ``model.safetensors`` and
``config.json``. The file does not say which noise was used in training, so the configuration must state it. To register
a version, the manifest of its training data is also needed, because evaluations check their data against it.

Reads ``weights.path`` and, to register, the manifest at ``data.path``. Writes the folder ``output.path`` and, to
register, a version in the registry. It is an error if the file would run code, is not a TarFlow or has non-finite
values, or if the folder contains another flow. Running the same command again changes nothing.
"""

from tarflow_scale import storage
from tarflow_scale.config.convert import ConvertConfig, ForeignWeightsConfig
from tarflow_scale.config.versions import RegistryConfig
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.ml_tarflow import load_ml_tarflow
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.records import DataSetFacts, ModelVersion, PixelFormat, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console, provenance
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet

__all__ = ["run"]

_BIT_DEPTH = 8


def run(config: ConvertConfig, dry_run: bool) -> None:
    """Convert the weights, write the flow, and register it if a registry is set.

    Raises:
        DataError: the file is not a TarFlow, or the output folder holds another flow.
        ConfigError: the model does not fit its data set.
    """
    noise = config.weights.noise
    flow = load_ml_tarflow(config.weights.path, config.weights.num_channels)
    flow.pixels = PixelFormat(bit_depth=_BIT_DEPTH, noise=noise.kind, noise_std=noise.std)
    manifest = ShardSet(config.data.path, config.data.verify).manifest if config.data is not None else None
    data = _trained_on(flow, manifest) if manifest is not None else None
    _print_plan(config.weights, config.output.path, flow)
    if dry_run:
        return
    files = flow_files(flow)
    for name, content in files.items():
        existing = storage.join(config.output.path, name)
        if storage.exists(existing) and storage.read_bytes(existing) != content:
            raise DataError(f"{config.output.path} holds another flow ({name} differs); choose another output.path")
    for name, content in files.items():
        storage.write_bytes(storage.join(config.output.path, name), content)
    print(f"{config.output.path}: {', '.join(files)}")
    if config.registry is not None and data is not None:
        digest = storage.digest(canonical_json(config.model_dump(mode="json")))
        version = _registered(config.registry, flow, files, data, digest, config.weights.path)
        print(f"registered {config.registry.model}@{version.version} in {config.registry.path}")


def _trained_on(flow: Flow, manifest: Manifest) -> DataSetFacts:
    """Describe the data set that the model was trained on, and check that it fits the model."""
    if manifest.event.shape != flow.event_shape or (flow.num_classes or 0) not in (0, manifest.num_classes):
        classes = flow.num_classes or "any number of"
        raise ConfigError(
            f"{manifest.name} must have the model's shape {flow.event_shape} and {classes} classes (got "
            f"{manifest.event.shape} and {manifest.num_classes}); set data.path to the data set that the "
            f"model was trained on"
        )
    if manifest.bit_depth != _BIT_DEPTH:
        raise ConfigError(
            f"public models need {_BIT_DEPTH}-bit images (got {manifest.bit_depth}-bit images in {manifest.name}); "
            f"pack the data set without source.bit_depth"
        )
    return manifest.facts()


def _registered(
    registry: RegistryConfig, flow: Flow, files: dict[str, bytes], data: DataSetFacts, digest: str, origin: str
) -> ModelVersion:
    assert flow.pixels is not None
    return Registry(registry.path, registry.model).register(
        files,
        {
            "pixels": flow.pixels.model_dump(mode="json"),
            "data": data.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in flow.parameters()),
            "images_seen": None,
            "ema_half_life_images": None,
            "config_digest": digest,
            "git_commit": provenance.git_commit(),
            "packages": provenance.package_versions(),
        },
        reason=f"converted from {origin}",
    )


def _print_plan(weights: ForeignWeightsConfig, output: str, flow: Flow) -> None:
    model, noise = flow.config, weights.noise
    assert model is not None
    assert model.kind == "tarflow"
    depths = model.layers_per_block
    rows = [
        ("weights", weights.path),
        (
            "images",
            f"{flow.event_shape}, {flow.num_classes or 'no'} classes, {noise.kind} noise {noise.std or ''}".strip(),
        ),
        (
            "model",
            f"patch {model.patch_size}, width {model.width}, {len(depths)} blocks of {depths} layers, {model.variant}",
        ),
        ("parameters", f"{sum(p.numel() for p in flow.parameters()):,}"),
        ("output", output),
    ]
    print(console.table(rows, ("convert", "")))
