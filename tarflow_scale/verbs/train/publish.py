"""The end of a run: export averaged weights to the run folder and register them."""

from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.config.versions import RegistryConfig
from tarflow_scale.errors import RegistryError
from tarflow_scale.flows import Flow
from tarflow_scale.flows.weights import flow_files
from tarflow_scale.records import DataSetFacts, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import provenance
from tarflow_scale.training.checkpoint import newest as newest_checkpoint

__all__ = ["Publication"]

_GIB = 1024**3


@dataclass(frozen=True)
class Publication:
    """Where a run publishes its model, and the metadata of the model.

    Args:
        folder: the run folder.
        registry: the registry and the name of the model.
        data: the first data set, with the image size that the model sees.
        num_parameters: number of parameters of the flow.
        first_half_life: half-life of the first average, in images; this average is exported to ``model/``, the others
            to ``model-ema-<half-life>/``.
        configuration: the resolved configuration.
        autoencoder: files of the autoencoder of a flow on latents; else empty.
    """

    folder: str
    registry: RegistryConfig
    data: DataSetFacts
    num_parameters: int
    first_half_life: int
    configuration: dict[str, Any]
    autoencoder: dict[str, bytes]

    def publish(self, flow: Flow, weights: dict[str, Tensor], half_life: int, images_seen: int) -> None:
        """Export and register one average of the weights."""
        files, configuration = flow_files(flow, weights) | self.autoencoder, canonical_json(self.configuration)
        exported = "model" if half_life == self.first_half_life else f"model-ema-{half_life}"
        for name, content in files.items():
            storage.write_bytes(f"{self.folder}/{exported}/{name}", content)
        assert flow.pixels is not None
        registry = Registry(self.registry.path, self.registry.model)
        known: Container[int] = ()
        with suppress(RegistryError):  # there is no such model yet
            known = registry.state().versions
        version = registry.register(
            files,
            {
                "pixels": flow.pixels.model_dump(mode="json"),
                "data": self.data.model_dump(mode="json"),
                "parameters": self.num_parameters,
                "images_seen": images_seen,
                "ema_half_life_images": half_life,
                "config_digest": storage.digest(configuration),
                "git_commit": provenance.git_commit(),
                "packages": provenance.package_versions(),
                "checkpoint": newest_checkpoint(f"{self.folder}/checkpoints"),
            },
            f"end of training {self.folder}",
            configuration,
        )
        name = f"{self.registry.model}@{version.version}"
        if version.version in known:
            print(f"the model is already registered as {name} in {self.registry.path}")
            return
        memory = provenance.peak_memory_bytes(next(flow.parameters()).device.type) / _GIB
        print(
            f"registered {name} in {self.registry.path} (peak {memory:.2f} GiB per rank); samples are in "
            f"{self.folder}/previews; next: run tarflow-scale evaluate with a file such as "
            f"configs/evaluate/folder.yaml"
        )
