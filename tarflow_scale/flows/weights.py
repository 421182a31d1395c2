"""A flow on disk: ``model.safetensors`` and ``config.json``. Nothing is pickled, nothing is executed on loading."""

import hashlib
import json
import os
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tarflow_scale import storage
from tarflow_scale.config.model import ModelConfig
from tarflow_scale.errors import DataError
from tarflow_scale.flows.build import build
from tarflow_scale.flows.flow import Flow
from tarflow_scale.records import LatentFacts, PixelFormat, canonical_json

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "flow_files", "flow_from_files", "load_flow", "save_flow", "tensors_digest"]

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_FORMAT = 1


def flow_files(flow: Flow, weights: dict[str, Tensor] | None = None) -> dict[str, bytes]:
    """The files of a flow by name; ``weights`` (by parameter and buffer name) replace the flow's own."""
    assert flow.config is not None, "only a flow made by build() knows its configuration"
    tensors = weights if weights is not None else flow.state_dict()
    facts = {
        "format": _FORMAT,
        "model": flow.config.model_dump(mode="json"),
        "event_shape": list(flow.event_shape),
        "num_classes": flow.num_classes,
        **({} if flow.num_conditions is None else {"num_conditions": flow.num_conditions}),
        **({"class_names": list(flow.class_names)} if flow.class_names else {}),
        **({} if flow.latents is None else {"latents": flow.latents.model_dump(mode="json")}),
        "pixels": flow.pixels.model_dump(mode="json") if flow.pixels else None,
    }
    return {
        WEIGHTS_NAME: save_tensors({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}),
        CONFIG_NAME: canonical_json(facts),
    }


def flow_from_files(files: dict[str, bytes], origin: str) -> Flow:
    """Rebuild a flow, in evaluation mode on the CPU.

    Raises:
        DataError: when a file is missing or damaged, or the weights do not fit the configuration.
    """
    try:
        facts: dict[str, Any] = json.loads(files[CONFIG_NAME])
        config: ModelConfig = TypeAdapter(ModelConfig).validate_python(facts["model"])
        # No memory and no random numbers: every tensor comes from the file. zuko's networks still allocate.
        # Tensors made in inference mode could not be trained or written to outside of it.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                flow = build(config, tuple(facts["event_shape"]), facts["num_classes"], facts.get("num_conditions"))
            flow.load_state_dict(load_tensors(files[WEIGHTS_NAME]), assign=True)
        flow.pixels = PixelFormat.model_validate(facts["pixels"]) if facts["pixels"] else None
        flow.latents = LatentFacts.model_validate(facts["latents"]) if "latents" in facts else None
        flow.class_names = tuple(map(str, facts.get("class_names", ())))
        _check_finite(flow)
    except (KeyError, ValueError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{origin} does not hold a flow ({reason}); export or register it again") from error
    return flow.eval()


def _check_finite(flow: Flow) -> None:
    for name, tensor in flow.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            number = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"weights must be finite (got {number} values of {name} that are not)")


def tensors_digest(flow: Flow) -> str:
    """SHA-256 of a flow's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(flow.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_flow(flow: Flow, path: str | os.PathLike[str]) -> None:
    """Write a flow to a folder or URL; the configuration last, so that a partly written flow is not one."""
    for name, content in flow_files(flow).items():
        storage.write_bytes(storage.join(os.fspath(path), name), content)


def load_flow(path: str | os.PathLike[str]) -> Flow:
    """Read a flow from a folder or URL, in evaluation mode on the CPU.

    Raises:
        DataError: when it is not a flow.
    """
    path, names = os.fspath(path), (CONFIG_NAME, WEIGHTS_NAME)
    for name in names:
        if not storage.exists(storage.join(path, name)):
            raise DataError(f"{path} is not a saved flow (no {name}); give the folder that save_flow wrote")
    return flow_from_files({name: storage.read_bytes(storage.join(path, name)) for name in names}, path)
