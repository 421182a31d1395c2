"""The optimizers that DeepSpeed wraps: AdamW, and Muon for matrices.

Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) is implemented by DeepSpeed, which
orthogonalizes the momentum of complete matrices at ZeRO 1 and 2, then divides the update among ranks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import OptimizerConfig
from tarflow_scale.flows.build import matrices

__all__ = ["build_optimizer"]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, parallelism: ParallelismConfig
) -> torch.optim.Optimizer:
    """Build the optimizer that DeepSpeed wraps, with the peak learning rates."""
    adam: dict[str, Any] = {
        "lr": config.peak_lr,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.kind == "adamw":
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if parallelism.zero_stage == 0:
            return _GuardedAdamW(trained, config.gradient_clip_norm, **adam)
        return torch.optim.AdamW(trained, **adam)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    chosen = {id(matrix) for matrix in matrices(module)}
    for parameter in module.parameters():
        parameter.use_muon = id(parameter) in chosen  # pyright: ignore[reportAttributeAccessIssue]
    inside = [p for p in module.parameters() if id(p) in chosen]
    outside = [p for p in module.parameters() if id(p) not in chosen]
    muon = {"lr": config.muon_peak_lr, "momentum": config.muon_momentum, "weight_decay": config.weight_decay}
    rest = {"lr": config.peak_lr, "betas": config.betas, "weight_decay": config.weight_decay, "eps": 1e-8}
    return MuonWithAuxAdam(
        [
            {"params": inside, "use_muon": True, "ns_method": "standard", **muon},
            {"params": outside, "use_muon": False, **rest},
        ],
        adam_optimizer=torch.optim.AdamW,
        adam_optimizer_kwargs={"fused": True},
    )


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW for stage 0 that clips gradients and skips a step with a non-finite gradient, as ZeRO's optimizers do.

    Gradients are already reduced over ranks, so all ranks make the same decision. DeepSpeed's engine reads ``overflow``
    and ``_global_grad_norm``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], clip_norm: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._clip_norm = clip_norm
        self._global_grad_norm = 0.0
        self.overflow = False

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        return None if self.overflow else super().step(closure)
