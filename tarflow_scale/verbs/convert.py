"""Verb ``convert``: turn a model that another project published into files of this package, and register it.

A flow is the ``.pth`` file of apple/ml-tarflow. Read its tensors without running code, infer all sizes, rename the
tensors, and write ``model.safetensors`` and ``config.json``. The file does not say which noise was used in training, so
the configuration must state it. To register a version, the manifest of its training data is also needed, because
evaluations check their data against it.

An autoencoder is a folder of diffusers, or the two files of taef2. It becomes ``autoencoder.safetensors`` and
``autoencoder.json``, which the verb ``encode`` reads from the registry.

Reads ``weights.path`` and, to register, the manifest at ``data.path``; or ``autoencoder.path``. Writes the folder
``output.path`` and, to register, a version in the registry. It is an error if a file would run code, is not such a
model or has non-finite values, or if the folder contains another model. Running the same command again changes nothing.
"""

from torch import nn

from tarflow_scale import storage
from tarflow_scale.autoencoders.stored import autoencoder_files, digest_of, read_published
from tarflow_scale.config.convert import ConvertConfig, ForeignWeightsConfig
from tarflow_scale.config.versions import RegistryConfig
from tarflow_scale.errors import ConfigError, DataError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.ml_tarflow import load_ml_tarflow
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.records import DataSetFacts, PixelFormat, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import console, provenance
from tarflow_scale.shards.manifest import Manifest
from tarflow_scale.shards.reader import ShardSet

__all__ = ["run"]

_BIT_DEPTH = 8


def run(config: ConvertConfig, dry_run: bool) -> None:
    """Convert the weights, write the flow, and register it if a registry is set.

    Raises:
        DataError: the file is not a TarFlow, the folder is not an autoencoder, or the output folder holds another
            model.
        ConfigError: the model does not fit its data set.
    """
    digest = storage.digest(canonical_json(config.model_dump(mode="json")))
    if config.autoencoder is not None:
        _convert_autoencoder(config.autoencoder.path, config.output.path, config.registry, digest, dry_run)
        return
    assert config.weights is not None
    noise = config.weights.noise
    flow = load_ml_tarflow(config.weights.path, config.weights.num_channels)
    flow.pixels = PixelFormat(bit_depth=_BIT_DEPTH, noise=noise.kind, noise_std=noise.std)
    manifest = ShardSet(config.data.path, config.data.verify).manifest if config.data is not None else None
    data = _trained_on(flow, manifest) if manifest is not None else None
    _print_plan(config.weights, config.output.path, flow)
    if dry_run:
        return
    files = flow_files(flow)
    _write(config.output.path, files)
    if config.registry is not None:
        _register(config.registry, flow, files, flow.pixels, data, digest, config.weights.path)


def _convert_autoencoder(source: str, output: str, registry: RegistryConfig | None, digest: str, dry_run: bool) -> None:
    autoencoder = read_published(source)
    files = autoencoder_files(autoencoder)
    rows = [
        ("autoencoder", f"{source}, {autoencoder.config.kind}"),
        (
            "latents",
            f"{autoencoder.latent_channels} channels, 1/{autoencoder.factor} of the sides of images with "
            f"{autoencoder.num_channels} channels",
        ),
        ("parameters", f"{sum(p.numel() for p in autoencoder.parameters()):,}"),
        ("digest", digest_of(files)),
        ("output", output),
    ]
    print(console.table(rows, ("convert", "")))
    if dry_run:
        return
    _write(output, files)
    if registry is not None:
        pixels = PixelFormat(bit_depth=_BIT_DEPTH, noise="none")
        _register(registry, autoencoder, files, pixels, None, digest, source)


def _write(path: str, files: dict[str, bytes]) -> None:
    """Write the files of a model to its output folder.

    Raises:
        DataError: the folder holds another model.
    """
    for name, content in files.items():
        existing = storage.join(path, name)
        if storage.exists(existing) and storage.read_bytes(existing) != content:
            raise DataError(f"{path} holds another model ({name} differs); choose another output.path")
    for name, content in files.items():
        storage.write_bytes(storage.join(path, name), content)
    print(f"{path}: {', '.join(files)}")


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


def _register(
    registry: RegistryConfig,
    model: nn.Module,
    files: dict[str, bytes],
    pixels: PixelFormat,
    data: DataSetFacts | None,
    digest: str,
    origin: str,
) -> None:
    version = Registry(registry.path, registry.model).register(
        files,
        {
            "pixels": pixels.model_dump(mode="json"),
            "data": None if data is None else data.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in model.parameters()),
            "images_seen": None,
            "ema_half_life_images": None,
            "config_digest": digest,
            "git_commit": provenance.git_commit(),
            "packages": provenance.package_versions(),
        },
        reason=f"converted from {origin}",
    )
    print(f"registered {registry.model}@{version.version} in {registry.path}")


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
