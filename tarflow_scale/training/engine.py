"""The interface to DeepSpeed: build the engine, take a step, read and write weights by parameter name.

The other modules of training use complete tensors by parameter name; only `ema` also uses partitions. The master
weights depend on the ZeRO stage. At stage 0 they are the parameters themselves. At stages 1 to 3 each rank holds an
fp32 partition of the master weights, and the parameters are a working copy. DeepSpeed's setters change only the master
weights, so a caller that sets master weights must also set the working copy.
"""

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import OptimizerConfig, TrainingConfig
from tarflow_scale.runtime.cores import num_threads
from tarflow_scale.runtime.distributed import (
    all_reduce_sum,
    backend_of,
    check_equal,
    local_world_size,
    own_device,
    rank,
    world_size,
)
from tarflow_scale.training.objective import MicroBatch, Objective, Values
from tarflow_scale.training.optimizers import build_optimizer
from tarflow_scale.training.zero import deepspeed_config

__all__ = ["MOMENTS", "MOMENTUM", "Engine", "StepResult", "start_process_group"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments. At ZeRO stages 1 to 3 they are partitioned like the master weights."""
MOMENTUM = "momentum_buffer"
"""Name of Muon's momentum. It is complete on every rank that holds a part of the matrix in its partition."""
_PREFIX = "model."
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step.

    Args:
        values: means of the objective's figures over this rank's images; the first is the loss in nats per dimension.
        gradient_norm: gradient norm over all ranks, before clipping.
        skipped: whether all ranks kept their weights, because a gradient was not finite or the step was rejected.
        rejected: whether the function ``reject`` of `Engine.step` refused the loss.
    """

    values: Values
    gradient_norm: float
    skipped: bool
    rejected: bool = False


def start_process_group(threads: int) -> torch.device:
    """Join the other ranks (or start a group of one) and return this rank's device.

    Args:
        threads: number of torch threads of this rank on a CPU, see `num_threads`.
    """
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(num_threads(threads, local_world_size()))
    if not dist.is_initialized():
        backend = backend_of(device)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=_TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    return device


class Engine:
    """Trains a model with DeepSpeed.

    Args:
        objective: the objective with a new model, equal on all ranks; the engine moves it to ``device`` and owns it.
        device: this rank's device.
        optimizer, training, parallelism: sections of the configuration.
    """

    def __init__(
        self,
        objective: Objective[Any],
        device: torch.device,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        parallelism: ParallelismConfig,
    ) -> None:
        deepspeed = _import_deepspeed()
        self.device = device
        self.stage: Literal[0, 1, 2, 3] = parallelism.zero_stage
        self.objective = module = objective.to(device).train()
        check_equal(module)
        if parallelism.compile:
            module.compile_networks()
        self.num_parameters = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
        settings = deepspeed_config(optimizer, training, parallelism, self.num_parameters, world_size())
        self.num_micro_batches = settings["gradient_accumulation_steps"]
        client = build_optimizer(module, optimizer, parallelism)
        self._peaks = [group["lr"] for group in client.param_groups]
        self._has_muon = optimizer.kind == "muon"
        self._engine: Any
        self._engine, _, _, _ = deepspeed.initialize(model=module, optimizer=client, config=settings)
        if world_size() == 1 and self.stage == 0:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients for a sum over one rank
        self._parameters = {
            name.removeprefix(_PREFIX): weight for name, weight in module.named_parameters() if weight.requires_grad
        }
        self.names = list(self._parameters)

    # -- a step ------------------------------------------------------------------------------------------------

    def step(
        self,
        micro_batches: Iterable[MicroBatch],
        rate: float,
        reject: Callable[[float], bool] | None = None,
    ) -> StepResult:
        """Make one optimizer step on this rank's share of a global batch.

        The loss is in nats per dimension, so that the size of gradients does not depend on the size of images.

        Args:
            micro_batches: inputs, one for each accumulated pass.
            rate: learning rate, as a fraction of its peak.
            reject: function that is called before the last backward pass with the mean loss over all ranks. If it
                returns True, the step changes nothing. It must return the same value on all ranks.
        """
        for group, peak in zip(self._engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate
        running = [(buffer, buffer.clone()) for name, buffer in self.buffers().items() if "running_" in name]
        skipped_before = self._engine.skipped_steps
        total = torch.zeros(1, device=self.device)
        rejected = False
        count = 0
        for batch in micro_batches:
            figures = self._engine(*batch)
            loss = figures[:, 0].mean() / self.objective.num_dims
            total = total + torch.cat([loss.detach()[None], figures[:, 1:].detach().mean(dim=0)])
            count += 1
            if reject is not None and count == self.num_micro_batches:
                rejected = reject(float(all_reduce_sum(total[0].double())) / (count * world_size()))
                # Every ZeRO stage skips the update if a gradient is not finite.
                loss = loss * float("nan") if rejected else loss
            self._engine.backward(loss)
            self._engine.step()
        assert count == self.num_micro_batches, "a step takes exactly the accumulated micro batches"
        norm = self._engine.get_global_grad_norm()
        skipped = self._engine.skipped_steps > skipped_before
        if skipped or rejected:
            for buffer, before in running:  # undo what the forward pass of a skipped step wrote
                buffer.copy_(before)
        return StepResult(
            values=tuple(value / count for value in total.tolist()),
            gradient_norm=float(norm) if norm is not None else 0.0,
            skipped=skipped,
            rejected=rejected,
        )

    def figures(self, batch: MicroBatch) -> Tensor:
        """The objective's figures ``(B, F)``, without gradient or dropout; all ranks must call."""
        self._engine.eval()
        try:
            with torch.no_grad():
                return self._engine(*batch)
        finally:
            self._engine.train()

    # -- weights by name -----------------------------------------------------------------------------------------

    def masters(self) -> list[Tensor]:
        """This rank's fp32 master tensors: flat partitions, or all parameters at stage 0."""
        optimizer = self._engine.optimizer
        match self.stage:
            case 0:
                return [p.data for p in self._parameters.values()]
            case 1 | 2:
                return [flat.data for flat in optimizer.single_partition_of_fp32_groups]
            case 3:
                return [flat.data for flat in optimizer.fp32_partitioned_groups_flat]

    def full_weight(self, name: str) -> Tensor:
        """The complete fp32 master weight of a parameter; all ranks must call."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self._parameters[name]
        full = parameter.data if self.stage == 0 else safe_get_full_fp32_param(parameter)
        assert full is not None
        return full.detach().float()

    def full_moment(self, name: str, moment: str) -> Tensor:
        """A complete optimizer moment of a parameter; all ranks must call, after the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter = self._parameters[name]
        if self.stage == 0:
            return self._engine.optimizer.state[parameter][moment]
        if self._has_muon:
            with self.exchanged(self._flat_moments(moment)):
                return self.full_weight(name).clone()
        full = safe_get_full_optimizer_state(parameter, moment)
        assert full is not None
        return full

    def set_master(self, name: str, value: Tensor) -> None:
        """Overwrite this rank's part of a master weight, given the complete weight. Also call `set_working_copy`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter, value = self._parameters[name], value.to(self.device)
        match self.stage:
            case 0:
                parameter.data.copy_(value)
            case 1 | 2:
                safe_set_full_fp32_param(parameter, value)
            case 3:
                safe_set_local_fp32_param(parameter, _own_part(parameter, value))

    def set_moment(self, name: str, moment: str, value: Tensor) -> None:
        """Overwrite this rank's part of an optimizer moment."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter, value = self._parameters[name], value.to(self.device)
        if self._has_muon:
            with self.exchanged(self._flat_moments(moment)):
                self.set_master(name, value)
            return
        match self.stage:
            case 0:
                self._engine.optimizer.state[parameter][moment].copy_(value)
            case 1 | 2:
                safe_set_full_optimizer_state(parameter, value, moment)
            case 3:
                safe_set_local_optimizer_state(parameter, _own_part(parameter, value), moment)

    def set_working_copy(self, name: str, value: Tensor) -> None:
        """Overwrite the weight that the forward pass uses; all ranks must call."""
        parameter = self._parameters[name]
        value = value.to(self.device)
        if self.stage < 3:
            parameter.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    @property
    def num_steps(self) -> int:
        """Number of optimizer updates; AdamW's bias correction depends on it."""
        steps = [int(state["step"]) for state in self._base_optimizer().state.values() if "step" in state]
        return max(steps, default=0)

    def set_num_steps(self, steps: int) -> None:
        """Overwrite the optimizer's count of updates."""
        for state in self._base_optimizer().state.values():
            if "step" in state:
                state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps

    def momenta(self) -> dict[str, Tensor]:
        """Muon's momentum of each matrix in this rank's partition, by name; callers may overwrite the tensors."""
        if self.stage not in (1, 2):
            return {}
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        zero, momenta = self._engine.optimizer, dict[str, Tensor]()
        for group, held in zip(zero.optimizer.param_groups, zero.params_in_partition, strict=True):
            momentum = zero.optimizer.state[group["params"][0]].get(MOMENTUM)
            if momentum is None:
                continue
            sizes = [parameter.numel() for parameter in held]
            for parameter, part in zip(held, momentum.split(sizes), strict=True):
                momenta[names[id(parameter)]] = part.view_as(parameter)
        return momenta

    def has_moments(self, name: str) -> bool:
        """Whether AdamW, and not Muon, updates this parameter."""
        return not getattr(self._parameters[name], "use_muon", False)

    @contextmanager
    def borrowing(self, weights: Iterable[tuple[str, Tensor]]) -> Generator[None]:
        """In the ``with`` block, forward passes use ``weights``, complete tensors by name. All ranks must enter.

        The master weights do not change; the working copies are restored at the end.
        """
        kept = {name: p.detach().clone() for name, p in self._parameters.items()} if self.stage == 0 else None
        for name, value in weights:
            self.set_working_copy(name, value)
        try:
            yield
        finally:
            for name in self.names:
                self.set_working_copy(name, kept[name] if kept is not None else self.full_weight(name))

    def buffers(self) -> dict[str, Tensor]:
        """Buffers by name. They are equal on all ranks, because running statistics are computed over all ranks."""
        return {name.removeprefix(_PREFIX): buffer for name, buffer in self.objective.named_buffers()}

    @contextmanager
    def exchanged(self, tensors: Sequence[Tensor | None]) -> Generator[None]:
        """In the ``with`` block, `full_weight` and `set_master` use ``tensors`` in place of `masters` (same layout)."""

        def swap() -> None:
            for master, tensor in zip(self.masters(), tensors, strict=True):
                if tensor is not None:
                    kept = master.clone()
                    master.copy_(tensor)
                    tensor.copy_(kept)

        swap()
        try:
            yield
        finally:
            swap()

    def _flat_moments(self, moment: str) -> list[Tensor | None]:
        """AdamW's moment of each group, None for Muon's groups. DeepSpeed's own getter fails with Muon (0.19.8)."""
        base = self._base_optimizer()
        return [base.state[group["params"][0]].get(moment) for group in base.param_groups]

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer if self.stage == 0 else self._engine.optimizer.optimizer


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's ZeRO-3 part of a complete tensor, padded with zeros.

    DeepSpeed's own setters for complete tensors fail if the number of ranks does not divide the tensor's size (0.19.8).
    """
    share = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, share * world_size() - value.numel()))
    return padded.narrow(0, share * rank(), share)


def _import_deepspeed() -> Any:
    """Import DeepSpeed without its shared-memory collectives on CPU.

    They would be compiled at the first start (35 s, needs g++ and ninja), and are useful only if all ranks are on one
    machine; gloo needs no compiler.
    """
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls deprecated functions of torch 2.15; each rank would warn, and a user cannot change it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
