"""DeepSpeed's configuration, and the number of parameters that DeepSpeed communicates in bf16."""

from typing import Any

import torch
from torch import nn

from tarflow_scale.capacity.memory import BUCKET_ELEMENTS, LIVE_ELEMENTS, ModelSize
from tarflow_scale.config.parallelism import ParallelismConfig
from tarflow_scale.config.train import OptimizerConfig, TrainingConfig
from tarflow_scale.errors import ConfigError

__all__ = ["deepspeed_config", "model_size"]

_SENT_IN_BF16 = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""DeepSpeed communicates the parameters of these modules, but not of subclasses, in bf16 (0.19.8,
``runtime/torch_autocast.py``)."""
_PERSISTENT_ELEMENTS = 100_000
"""Stage 3 partitions only parameters with more elements than this, or than 1 % of all elements if that is less."""


def deepspeed_config(
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    num_parameters: int,
    ranks: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration, computed from sections of our configuration. No value is ``auto``.

    Args:
        optimizer: the section ``optimizer``.
        training: the section ``training``.
        parallelism: the section ``parallelism``.
        num_parameters: number of parameters of the flow, which limits the bucket size: buckets are allocated in full.
        ranks: world size.

    Raises:
        ConfigError: the global batch size is not a multiple of micro batch size times ranks.
    """
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % (micro * ranks):
        nearest = max(1, round(batch / (micro * ranks))) * micro * ranks
        smaller = (
            f", or training.micro_batch_size={batch // ranks}" if batch % ranks == 0 and batch // ranks < micro else ""
        )
        raise ConfigError(
            f"training.global_batch_size must be a multiple of training.micro_batch_size x ranks "
            f"(got {batch} and {micro} x {ranks} = {micro * ranks}); use training.global_batch_size={nearest}{smaller}"
        )
    # At stage 0 our optimizer clips; Muon's updates do not depend on the norm of gradients.
    clips = parallelism.zero_stage > 0 and optimizer.kind == "adamw"
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * ranks),
        "gradient_clipping": optimizer.gradient_clip_norm if clips else 0.0,
        "steps_per_print": None,
        "torch_autocast": {"enabled": parallelism.precision == "bf16", "dtype": "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW also runs on the CPU, and needs no compiler
        "zero_optimization": _zero_section(parallelism, num_parameters),
    }


def _zero_section(parallelism: ParallelismConfig, num_parameters: int) -> dict[str, Any]:
    bucket = max(1, min(BUCKET_ELEMENTS, num_parameters))
    cuda = torch.cuda.is_available()
    section: dict[str, Any] = {
        "stage": parallelism.zero_stage,
        "overlap_comm": cuda,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": LIVE_ELEMENTS,
        "stage3_max_reuse_distance": LIVE_ELEMENTS,
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


def model_size(flow: nn.Module) -> ModelSize:
    """Count the parameters of a flow, and those that are communicated in bf16. The flow may be on the meta device."""
    return ModelSize(
        parameters=sum(p.numel() for p in flow.parameters()),
        low_precision=sum(
            p.numel() for m in flow.modules() if type(m) in _SENT_IN_BF16 for p in m.parameters(recurse=False)
        ),
    )
