"""The end of a run: export averaged weights to the run folder and register them."""

from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.config.versions import RegistryConfig
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import DataSetFacts, canonical_json
from tarflow_scale.registry import Registry
from tarflow_scale.runtime import provenance
from tarflow_scale.training.checkpoint import newest as newest_checkpoint
from tarflow_scale.verbs.train.subject import Subject

__all__ = ["Publication"]

_GIB = 1024**3


@dataclass(frozen=True)
class Publication:
    """Where a run publishes its model, and the metadata of the model.

    Args:
        folder: the run folder.
        registry: the registry and the name of the model.
        data: the first data set, with the image size that the model sees.
        first_half_life: half-life of the first average, in images; this average is exported to ``model/``, the others
            to ``model-ema-<half-life>/``.
        configuration: the resolved configuration.
        subject: what the run trains.
    """

    folder: str
    registry: RegistryConfig
    data: DataSetFacts
    first_half_life: int
    configuration: dict[str, Any]
    subject: Subject

    def publish(self, weights: dict[str, Tensor], half_life: int, images_seen: int, device: torch.device) -> None:
        """Export and register one average of the weights."""
        subject = self.subject
        files, configuration = subject.files(weights), canonical_json(self.configuration)
        exported = "model" if half_life == self.first_half_life else f"model-ema-{half_life}"
        for name, content in files.items():
            storage.write_bytes(f"{self.folder}/{exported}/{name}", content)
        registry = Registry(self.registry.path, self.registry.model)
        known: Container[int] = ()
        with suppress(RegistryError):  # there is no such model yet
            known = registry.state().versions
        version = registry.register(
            files,
            {
                "pixels": subject.pixels.model_dump(mode="json"),
                "data": self.data.model_dump(mode="json"),
                "parameters": subject.size.parameters,
                "images_seen": images_seen,
                "ema_half_life_images": half_life,
                "config_digest": storage.digest(configuration),
                "git_commit": provenance.git_commit(),
                "packages": provenance.package_versions(),
                "checkpoint": newest_checkpoint(f"{self.folder}/checkpoints"),
                **subject.lineage,
            },
            f"end of training {self.folder}",
            configuration,
        )
        name = f"{self.registry.model}@{version.version}"
        if version.version in known:
            print(f"the model is already registered as {name} in {self.registry.path}")
            return
        memory = provenance.peak_memory_bytes(device.type) / _GIB
        print(f"registered {name} in {self.registry.path} (peak {memory:.2f} GiB per rank); {subject.next_step}")
