"""The section ``parallelism``: DeepSpeed ZeRO, precision, and how the backward pass gets activations."""

from typing import Literal

from pydantic import Field, model_validator

from tarflow_scale.config.base import Section
from tarflow_scale.config.model import Activations

__all__ = ["ParallelismConfig", "ZeroPlusPlusConfig"]


class ZeroPlusPlusConfig(Section):
    """ZeRO++ (arXiv 2306.10209): less traffic between nodes at stage 3, on CUDA."""

    secondary_partition_ranks: int = Field(default=1, ge=1)
    """hpZ: number of ranks that share a second copy of the weights, usually the ranks of a node, so that the backward
    pass gathers weights inside the node. A rank's part of the copy takes 4 bytes per parameter, divided by this number.
    1 turns hpZ off."""
    quantized_weights: bool = False
    """qwZ: weights are sent as int8."""
    quantized_gradients: bool = False
    """qgZ: gradients are sent as int4."""

    @property
    def enabled(self) -> bool:
        """Whether any of these settings is on."""
        return self != ZeroPlusPlusConfig()


class ParallelismConfig(Section):
    """DeepSpeed ZeRO. Stage 1 divides the optimizer's state among ranks, stage 2 also gradients, stage 3 also weights.

    The table shows the memory of a rank in bytes per parameter, for N ranks and E moving averages, without activations:
    memory that is always allocated, and additional memory in the backward pass. Buckets are two to four buffers of 50
    million numbers.

    ===== ================== ============= ===============================================================
    stage always             N = 8, E = 1  additional
    ===== ================== ============= ===============================================================
    0     12 + 4 E / N       12.5          gradients 4, and 4 for the copy that is reduced over ranks
    1     4 + (12 + 4 E) / N 6.0           4 / N and buckets; 4 and buckets where gradients accumulate
    2     4 + (12 + 4 E) / N 6.0           4 / N and buckets; 8 / N and buckets where gradients accumulate
    3     (20 + 4 E) / N     3.0           4 for gathered weights, at most a billion of them
    ===== ================== ============= ===============================================================

    Use stage 0 for models of up to about 0.2 billion parameters (4.1 GB), because it spends the least time waiting for
    buckets. Use stage 1 or 2 for 0.2 to 3 billion parameters, such as every published TarFlow; 3 billion parameters at
    stage 2 on 8 ranks need 20 GB per GPU. Both stages need the same memory unless gradients accumulate; then stage 2
    saves memory, but reduces gradients over ranks for every micro batch. Use stage 3 for larger models or small GPUs.
    Offloading saves more memory at the cost of speed: it moves the (16 + 4 E) / N bytes of the optimizer to main
    memory. The verb ``plan`` computes memory, speed and traffic of a recipe at all stages.
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: compute matrix products in bfloat16 by autocast; parameters, affine maps and sums stay fp32."""
    activations: Activations = "keep"
    """How the backward pass gets activations. ``keep``: from memory. ``checkpoint``: keep only the inputs of layers,
    and run each layer again. ``rebuild`` (Glow): invert the layers one by one, so that memory does not grow with depth.
    The last two take more time."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """``optimizer``: keep master weights, moments and averages in main memory, and update them on the CPU (stages 1 to
    3). ``all``: also keep the weights there, and fetch them when they are needed (stage 3)."""
    compile: bool = False
    """Compile the transformer layers of TarFlow or the coupling networks of Glow with torch.compile; the first step
    then takes about a minute."""
    zero_plus_plus: ZeroPlusPlusConfig = ZeroPlusPlusConfig()

    @model_validator(mode="after")
    def _stage_allows(self) -> "ParallelismConfig":
        stage = self.zero_stage
        if self.offload == "optimizer" and stage == 0:
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3 (got 0); raise zero_stage")
        if self.offload == "all" and stage != 3:
            raise ValueError(f"offload=all needs zero_stage 3 (got {stage}); use offload=optimizer or zero_stage=3")
        if self.zero_plus_plus.enabled and stage != 3:
            raise ValueError(f"zero_plus_plus needs zero_stage 3 (got {stage}); raise zero_stage or remove the section")
        if self.compile and self.activations == "rebuild":
            raise ValueError("compile needs activations=keep or checkpoint (got rebuild); use checkpoint")
        return self
