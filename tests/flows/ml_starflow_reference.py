"""What the public code of STARFlow computes on small models, for `test_ml_starflow`: run on a checkout of it.

Weights are a function of their name, so that a fixture holds outputs alone. The public code casts to fp32 in places;
here these casts give fp64, so that the fixture is exact to fp64. The fixture was made by

    python -m tests.flows.ml_starflow_reference PATH_OF_ML_STARFLOW tests/flows/ml_starflow_fixture.npz
"""

import contextlib
import importlib.util
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

NUM_CLASSES = 3
BATCH = 3
HEAD_WIDTH = 32
WIDTH = 64


@dataclass(frozen=True)
class Case:
    """A public model and how it is sampled, by keyword arguments of the public code, and the options that equal them.

    Args:
        public: arguments of the public ``Model``.
        ours: fields of `TarFlowConfig`.
        grid: rows and columns of tokens of the data.
        trained: side of the training images in tokens.
        patch_size: side of a patch.
        conditional: whether there are labels.
        guidance: scales of guided samples.
    """

    public: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    grid: tuple[int, int] = (4, 4)
    trained: int = 4
    patch_size: int = 1
    conditional: bool = False
    guidance: tuple[float, ...] = ()


_PREFIX = {"txt_size": 1, "txt_dim": NUM_CLASSES + 1}
_OURS = {"start_token": True, "positions": "rotary", "scale": "softplus", "final_norm": True}
_PUBLIC = {"sos": True, "rope": True, "use_softplus": True, "use_final_norm": True}
CASES = {
    "published": Case(
        public=_PUBLIC | _PREFIX | {"seq_order": "L2R", "cond_top_only": True, "soft_clip": 4.0},
        ours=_OURS
        | {"first_order": "backward", "conditioning": "prefix", "conditioned_blocks": "last", "output_bound": 4.0},
        conditional=True,
        guidance=(1.5,),
    ),
    "wide_top": Case(
        public=_PUBLIC
        | _PREFIX
        | {"cond_top_only": True, "top_block_channels": 96, "use_swiglu": True}
        | {"norm_type": "rms_norm", "use_qk_norm": True},
        ours=_OURS
        | {"conditioning": "prefix", "conditioned_blocks": "last", "deep_width": 96, "mlp": "gated"}
        | {"norm": "rms", "qk_norm": True},
        conditional=True,
        guidance=(0.7,),
    ),
    "grouped": Case(public=_PUBLIC | {"num_kv_heads": 1}, ours=_OURS | {"queries_per_key": 2}),
    "other_size": Case(public=_PUBLIC, ours=_OURS, grid=(3, 6)),
    "every_block": Case(
        public=_PREFIX | {"rope": True},
        ours={"conditioning": "prefix", "positions": "rotary"},
        patch_size=2,
        conditional=True,
        guidance=(1.0,),
    ),
}
CHUNK = 5
CHANNELS = 3


def layers_of(case: Case) -> list[int]:
    """Layers of the blocks, data to noise."""
    return [1, 2, 3] if case.public.get("cond_top_only") else [1, 2]


def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of a tensor, by its public name; far from the initial ones, yet of a model that can be inverted."""
    draw = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    scale = 0.015 if "proj_out" in name else 0.5 if "sos" in name else 0.1
    centre = 1.0 if "norm.weight" in name and "final" not in name else 0.0
    return torch.from_numpy(centre + scale * draw.standard_normal(shape))


def state_dict(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A public state dict; buffers that the public code calls deprecated are left out."""
    unused = ("attn_mask", "var", "feat_rope")
    return {
        name: weights(name, shape)
        for name, shape in shapes.items()
        if not any(part in name.split(".") for part in unused)
    }


def inputs(case: Case) -> dict[str, torch.Tensor]:
    """Images, labels (the last is dropped), labels of samples, and latents in the shape of the images."""
    draw = np.random.Generator(np.random.Philox(7))
    shape = (BATCH, CHANNELS, case.grid[0] * case.patch_size, case.grid[1] * case.patch_size)
    return {
        "x": torch.from_numpy(draw.uniform(-1, 1, shape)),
        "latents": torch.from_numpy(draw.standard_normal(shape)),
        "y": torch.tensor([2, 0, -1]),
        "sample_y": torch.tensor([1, 2, 0]),
    }


@contextlib.contextmanager
def _in_double() -> Iterator[None]:
    """The public code calls ``.float()`` for precision, and makes positions in fp32; here neither may lose any."""
    original = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = original  # type: ignore[method-assign]


def _public_module(checkout: Path) -> Any:
    sys.path.insert(0, str(checkout))
    spec = importlib.util.spec_from_file_location("ml_starflow", checkout / "transformer_flow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(checkout))
    return module


def _one_hot(labels: torch.Tensor) -> torch.Tensor:
    classes = torch.where(labels < 0, NUM_CLASSES, labels)
    return torch.nn.functional.one_hot(classes, NUM_CLASSES + 1).double()[:, None]


def _public_model(module: Any, case: Case) -> Any:
    model = module.Model(
        in_channels=CHANNELS, img_size=case.trained * case.patch_size, patch_size=case.patch_size, channels=WIDTH,
        num_blocks=len(layers_of(case)), layers_per_block=layers_of(case), head_dim=HEAD_WIDTH, **case.public,
    ).double().eval()  # fmt: skip
    for rope in (model.feat_rope, model.feat_rope_gen):
        if rope is not None:  # the frequencies are fp32 in the public code
            count = len(rope.freqs)
            rope.freqs = 10_000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
            if hasattr(rope, "freqs2"):
                rope.freqs2 = rope.freqs2.double()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(state_dict(shapes), strict=False)
    return model


@torch.no_grad()
def compute(checkout: Path) -> dict[str, np.ndarray]:
    """All results that `test_ml_starflow` compares, by ``case/name``."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    module, results = _public_module(checkout), dict[str, np.ndarray]()
    torch.distributed.all_reduce = lambda *_, **__: None  # type: ignore[assignment]
    with _in_double():
        for name, case in CASES.items():
            model, given = _public_model(module, case), inputs(case)
            shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            y = _one_hot(given["y"]) if case.conditional else None
            z, _, _, log_dets = model(given["x"], y)
            total = sum(log_det.flatten(1).sum(dim=1) for log_det in log_dets)
            results[f"{name}/shapes"] = np.array(
                [f"{key} {' '.join(map(str, shape))}" for key, shape in shapes.items()]
            )
            results |= {f"{name}/z": z.numpy(), f"{name}/log_det": total.numpy()}
            sample_y = _one_hot(given["sample_y"]) if case.conditional else None
            dropped = _one_hot(torch.full((BATCH,), -1))
            chunked = bool(case.public.get("sos") and case.public.get("rope"))
            for scale in (0.0, *case.guidance):
                condition = sample_y if scale == 0 or sample_y is None else torch.cat([sample_y, dropped])
                results[f"{name}/sample_{scale}"] = model.reverse(given["latents"], condition, guidance=scale).numpy()
                if chunked:
                    options = {"jacobi": True, "jacobi_block_size": CHUNK, "jacobi_th": 0.0}
                    sample = model.reverse(given["latents"], condition, guidance=scale, **options)
                    results[f"{name}/chunks_{scale}"] = sample.numpy()
    return results


if __name__ == "__main__":
    np.savez_compressed(sys.argv[2], **compute(Path(sys.argv[1])))  # type: ignore[arg-type]
