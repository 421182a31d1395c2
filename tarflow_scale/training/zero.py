"""What the configuration means to DeepSpeed: its dictionary, and the bytes a parameter costs."""

from typing import Any

import torch

from tarflow_scale.config import OptimizerConfig, ParallelismConfig, TrainingConfig
from tarflow_scale.errors import ConfigError

__all__ = ["deepspeed_config", "state_bytes_per_parameter"]

_BUCKET_ELEMENTS = 50_000_000
_PERSISTENT_ELEMENTS = 100_000
"""Smaller parameters stay whole on every rank at stage 3; never more than a hundredth of the model each."""


def deepspeed_config(
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    num_parameters: int,
    ranks: int,
) -> dict[str, Any]:
    """The DeepSpeed configuration that the sections imply. Nothing is ``auto``; no number is kept twice.

    Args:
        optimizer: the section ``optimizer``.
        training: the section ``training``.
        parallelism: the section ``parallelism``.
        num_parameters: of the flow; reduction buckets are no larger, because DeepSpeed allocates them whole.
        ranks: world size.

    Raises:
        ConfigError: when the global batch is not a multiple of micro batch times ranks.
    """
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % (micro * ranks):
        down = max(1, batch // (micro * ranks)) * micro * ranks
        raise ConfigError(
            f"training.global_batch_size must be a multiple of training.micro_batch_size x ranks "
            f"(got {batch} and {micro} x {ranks} = {micro * ranks}); use {down}"
        )
    # At stage 0 our optimizer clips; Muon's updates have no norm to clip.
    clips = parallelism.zero_stage > 0 and optimizer.kind == "adamw"
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * ranks),
        "gradient_clipping": optimizer.gradient_clip_norm if clips else 0.0,
        "steps_per_print": None,
        "torch_autocast": {"enabled": parallelism.precision == "bf16", "dtype": "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW updates on the CPU too, and needs no compiler
        "zero_optimization": _zero_section(parallelism, num_parameters),
    }


def _zero_section(parallelism: ParallelismConfig, num_parameters: int) -> dict[str, Any]:
    bucket = max(1, min(_BUCKET_ELEMENTS, num_parameters))
    cuda = torch.cuda.is_available()
    section: dict[str, Any] = {
        "stage": parallelism.zero_stage,
        "overlap_comm": cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": min(_PERSISTENT_ELEMENTS, num_parameters // 100),
    }
    if parallelism.offload != "none":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if parallelism.offload == "all":
        section["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    extra = parallelism.zero_plus_plus
    if extra.enabled:
        section |= {
            "zero_hpz_partition_size": extra.secondary_partition_ranks,
            "zero_quantized_weights": extra.quantized_weights,
            "zero_quantized_gradients": extra.quantized_gradients,
        }
    return section


def state_bytes_per_parameter(parallelism: ParallelismConfig, num_averages: int, ranks: int) -> tuple[float, float]:
    """Bytes a parameter on the device and in main memory, by the arithmetic of `ParallelismConfig`."""
    weights = gradients = 4.0
    moments, averages = 8.0, 4.0 * num_averages
    stage = parallelism.zero_stage
    if stage == 0:
        return weights + gradients + moments + averages / ranks, 0.0
    update = (4.0 + moments + averages) / ranks  # masters, moments, averages
    gradients /= ranks if stage >= 2 else 1
    weights /= ranks if stage == 3 else 1
    match parallelism.offload:
        case "none":
            return weights + gradients + update, 0.0
        case "optimizer":
            return weights + gradients, update
        case "all":
            return gradients, weights + update
