"""A flow on disk: ``model.safetensors`` and ``config.json``. Nothing is pickled; loading executes no code."""

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

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "check_finite",
    "flow_files",
    "flow_from_files",
    "load_flow",
    "read_plain_weights",
    "save_flow",
    "tensors_digest",
]

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_FORMAT = 1


def flow_files(flow: Flow, weights: dict[str, Tensor] | None = None) -> dict[str, bytes]:
    """The contents of a flow's files, keyed by file name; ``weights``, keyed by name, replace the flow's weights."""
    assert flow.config is not None, "only a flow made by build() knows its configuration"
    tensors = weights if weights is not None else flow.state_dict()
    description = {
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
        CONFIG_NAME: canonical_json(description),
    }


def flow_from_files(files: dict[str, bytes], origin: str) -> Flow:
    """Build the flow that these files store, in evaluation mode on the CPU.

    Raises:
        DataError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    try:
        stored: dict[str, Any] = json.loads(files[CONFIG_NAME])
        config: ModelConfig = TypeAdapter(ModelConfig).validate_python(stored["model"])
        # Every tensor comes from the file, so building takes no memory (except in zuko) and draws no random numbers.
        # Tensors made in inference mode could not be trained or written to outside of it.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                flow = build(config, tuple(stored["event_shape"]), stored["num_classes"], stored.get("num_conditions"))
            flow.load_state_dict(load_tensors(files[WEIGHTS_NAME]), assign=True)
        flow.pixels = PixelFormat.model_validate(stored["pixels"]) if stored["pixels"] else None
        flow.latents = LatentFacts.model_validate(stored["latents"]) if "latents" in stored else None
        flow.class_names = tuple(map(str, stored.get("class_names", ())))
        check_finite(flow)
    except (KeyError, ValueError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{origin} does not contain a valid flow ({reason}); export or register the flow again"
        ) from error
    return flow.eval()


def check_finite(flow: Flow) -> None:
    """Raise ValueError if a parameter or buffer of the flow has a value that is not finite."""
    for name, tensor in flow.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            number = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"weights must be finite (got {number} values of {name} that are not)")


def tensors_digest(flow: Flow) -> str:
    """SHA-256 of a flow's parameters and buffers and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(flow.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_plain_weights(path: str | os.PathLike[str], origin: str) -> Any:
    """Read a ``.pth`` file of plain tensors onto the CPU.

    Raises:
        DataError: the file is damaged, or would run code; the message names ``origin``.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise any exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{origin} cannot be read as plain weights ({reason}); pass a file that contains only tensors"
        ) from error


def save_flow(flow: Flow, path: str | os.PathLike[str]) -> None:
    """Write a flow to a folder or URL. The configuration is written last; without it the folder is not a flow."""
    for name, content in flow_files(flow).items():
        storage.write_bytes(storage.join(os.fspath(path), name), content)


def load_flow(path: str | os.PathLike[str]) -> Flow:
    """Read a flow from a folder or URL, in evaluation mode on the CPU.

    Raises:
        DataError: there is no complete flow at ``path``.
    """
    path, names = os.fspath(path), (CONFIG_NAME, WEIGHTS_NAME)
    for name in names:
        if not storage.exists(storage.join(path, name)):
            raise DataError(f"{path} is not a saved flow ({name} is missing); pass the folder that save_flow wrote")
    return flow_from_files({name: storage.read_bytes(storage.join(path, name)) for name in names}, path)
