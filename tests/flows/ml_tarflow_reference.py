"""What the public code computes on small models, for `test_ml_tarflow`: run on a checkout of apple/ml-tarflow.

Weights are a function of their name, so that a fixture holds inputs and outputs alone. The fixture was made by

    python -m tests.flows.ml_tarflow_reference PATH_OF_ML_TARFLOW tests/flows/ml_tarflow_fixture.npz
"""

import importlib.util
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

NUM_CLASSES = 3
BATCH = 3


@dataclass(frozen=True)
class Case:
    """A public model and how it is sampled, by keyword arguments of the public code."""

    channels: int = 3
    image_size: int = 8
    patch_size: int = 2
    num_blocks: int = 3
    layers_per_block: int = 2
    nvp: bool = True
    num_classes: int = 0
    samplings: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"plain": {}})


CASES = {
    "conditional": Case(
        num_classes=NUM_CLASSES,
        samplings={
            "plain": {},
            "guided": {"guidance": 1.0},
            "annealed": {"guidance": 1.5, "annealed_guidance": True},
            "mean_only": {"guidance": 1.0, "guide_what": "b"},
            "tempered": {"guidance": 0.7, "attn_temp": 0.6},
        },
    ),
    "unconditional": Case(
        channels=1,
        image_size=12,
        patch_size=3,
        samplings={"plain": {}, "guided": {"guidance": 0.8, "attn_temp": 0.3, "annealed_guidance": True}},
    ),
    "volume_preserving": Case(nvp=False, num_blocks=2, num_classes=NUM_CLASSES),
}
DENOISE_STD = 0.05


def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of a tensor, by its public name; far from the initial ones, yet of a model that can be inverted."""
    draw = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    if name.endswith("attn_mask"):
        return torch.ones(shape).tril()
    if name == "var":
        return torch.from_numpy(draw.uniform(0.3, 2.0, shape)).float()
    scale = 0.04 if "proj_out" in name else 0.08
    centre = 1.0 if name.endswith("norm.weight") else 0.0
    return torch.from_numpy(centre + scale * draw.standard_normal(shape)).float()


def state_dict(shapes: Mapping[str, tuple[int, ...]], affine: bool) -> dict[str, torch.Tensor]:
    """A public state dict."""
    state = {name: weights(name, shape) for name, shape in shapes.items()}
    if affine:
        state["var"] = torch.ones(shapes["var"])
    return state


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Images, labels (the last is dropped) and latents."""
    draw = np.random.Generator(np.random.Philox(7))
    side = case.image_size // case.patch_size
    x = draw.uniform(-1, 1, (BATCH, case.channels, case.image_size, case.image_size))
    z = draw.standard_normal((BATCH, side**2, case.channels * case.patch_size**2))
    return {
        "x": torch.from_numpy(x).float(),
        "y": torch.tensor([2, 0, -1]) if case.num_classes else torch.empty(0, dtype=torch.int64),
        "sample_y": torch.tensor([1, 2, 0]) if case.num_classes else torch.empty(0, dtype=torch.int64),
        "latents": torch.from_numpy(z).float(),
    }


def public_module(checkout: Path) -> Any:
    """The public ``transformer_flow.py`` as a module."""
    spec = importlib.util.spec_from_file_location("transformer_flow", checkout / "transformer_flow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compute(checkout: Path) -> dict[str, np.ndarray]:
    """All results that `test_ml_tarflow` compares, by ``case/name``."""
    module = public_module(checkout)
    found: dict[str, np.ndarray] = {}
    for name, case in CASES.items():
        model = module.Model(
            in_channels=case.channels,
            img_size=case.image_size,
            patch_size=case.patch_size,
            channels=64,
            num_blocks=case.num_blocks,
            layers_per_block=case.layers_per_block,
            nvp=case.nvp,
            num_classes=case.num_classes,
        ).eval()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(state_dict(shapes, case.nvp))
        given = inputs(case)
        y, sample_y = (given[key] if case.num_classes else None for key in ("y", "sample_y"))
        z, _, log_dets = model(given["x"], y)
        found[f"{name}/shapes"] = np.array([f"{key} {' '.join(map(str, shape))}" for key, shape in shapes.items()])
        found |= {f"{name}/z": z.detach().numpy(), f"{name}/log_det_per_dim": _rows(log_dets, BATCH)}
        found |= {f"{name}/sample_{key}": _sample(model, given, sample_y, arguments)
                  for key, arguments in case.samplings.items()}  # fmt: skip
        if case.nvp:
            found[f"{name}/denoised"] = _denoised(model, given["x"], sample_y)
    return found


def _rows(log_dets: torch.Tensor, batch: int) -> np.ndarray:
    return log_dets.detach().expand(batch).numpy().copy()


def _sample(model: Any, given: Mapping[str, torch.Tensor], y: Any, arguments: Mapping[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return model.reverse(given["latents"].clone(), y, **arguments).numpy()


def _denoised(model: Any, x: torch.Tensor, y: Any) -> np.ndarray:
    """The step of the public evaluation: its rate is batch times dimensions times noise variance."""
    x = x.clone().requires_grad_()
    z, _, log_dets = model(x, y)
    (gradient,) = torch.autograd.grad(model.get_loss(z, log_dets), x)
    return (x - DENOISE_STD**2 * x.numel() * gradient).detach().numpy()


def as_state_dict(fixture: Mapping[str, np.ndarray], name: str) -> dict[str, torch.Tensor]:
    """The public state dict of a case, from the fixture's list of shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in fixture[f"{name}/shapes"]:
        key, *sizes = str(line).split()
        shapes[key] = tuple(map(int, sizes))
    return state_dict(shapes, CASES[name].nvp)


Compute = Callable[[Path], dict[str, np.ndarray]]

if __name__ == "__main__":
    np.savez_compressed(sys.argv[2], **compute(Path(sys.argv[1])))
