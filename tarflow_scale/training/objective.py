"""What a run minimises: the interface between the training loop and a model, and the objective of flows.

An objective turns a batch into the inputs of a forward pass, and a forward pass into figures for each image. The first
figure is the loss. `tarflow_scale.training.reconstruction` has the objective of autoencoders.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.flows import Flow, TarFlow, standard_normal_log_prob
from tarflow_scale.flows.build import compile_networks
from tarflow_scale.records import PixelFormat
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training.noise import conditions, model_input

__all__ = ["FlowObjective", "MicroBatch", "Objective", "Values"]

MicroBatch = tuple[Tensor | None, ...]
"""Inputs of one forward pass."""
Values = tuple[float, ...]
"""Means of the figures of an objective: the loss in nats per dimension, then the other figures."""


M = TypeVar("M", bound=nn.Module)


class Objective(nn.Module, ABC, Generic[M]):
    """What a run minimises. DeepSpeed wraps it.

    ``forward`` takes what `inputs` returns, and returns figures ``(B, F)`` of the images. The first figure is the loss
    in nats; the others are only logged.

    Args:
        model: the model to train; weights that do not require gradients stay as they are.
        num_dims: number of dimensions of an image, by which the loss is divided.
    """

    def __init__(self, model: M, num_dims: int) -> None:
        super().__init__()
        self.model = model
        self.num_dims = num_dims

    @abstractmethod
    def inputs(self, batch: Batch, seed: int, device: torch.device, training: bool) -> MicroBatch:
        """The inputs of `forward` for a batch, a function of (seed, epoch, sample).

        Args:
            batch: the batch.
            seed: seed of all random numbers.
            device: device of the inputs.
            training: whether to change the batch at random as in training.
        """

    @abstractmethod
    def record(self, values: Values | None) -> dict[str, float | None]:
        """Figures for the log, by name; ``nats_per_dim`` is the loss. All are None without values."""

    def text(self, values: Values) -> str:
        """The most important figures for the progress line."""
        record = self.record(values)
        bits = record["bits_per_dim"]
        return f"{record['nats_per_dim']:.3f} nats/dim" if bits is None else f"{bits:.3f} bits/dim"

    def initialize(self, batch: Batch, micro_batch_size: int, seed: int, device: torch.device) -> None:
        """Initialize a new model from this rank's part of the first batch; all ranks must call."""

    def compile_networks(self) -> None:
        """Compile the networks of the model."""
        compile_networks(self.model)

    def diagnostics(self) -> dict[str, float]:
        """Statistics of the latest forward pass on this rank for the log, by name."""
        return {}


class FlowObjective(Objective[Flow]):
    """The negative log-likelihood of a flow; an upper bound of it if noise is learned.

    With ``latent_norm_weight`` w, the loss per dimension also contains w times the mean square of the tokens between
    each two blocks of a TarFlow (STARFlow, arXiv 2506.06276), which keeps their scale from growing.

    Args:
        flow: the flow; `inputs` and `record` need its pixel format.
        conditional: whether the flow takes labels or other conditions.
        label_drop: probability that the label of a sample is dropped in training.
        latent_norm_weight: the weight w; 0 leaves the term out.
    """

    def __init__(self, flow: Flow, conditional: bool, label_drop: float, latent_norm_weight: float = 0.0) -> None:
        super().__init__(flow, flow.num_dims)
        self._conditional = conditional
        self._label_drop = label_drop
        self._latent_norm_weight = latent_norm_weight
        self._squares: list[Tensor] = []
        if latent_norm_weight > 0:
            assert isinstance(flow, TarFlow)
            for block in flow.blocks[:-1]:
                block.register_forward_hook(self._add_square)

    def _add_square(self, block: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        del block, inputs
        self._squares.append(outputs[0].square().flatten(1).mean(dim=1))

    def inputs(self, batch: Batch, seed: int, device: torch.device, training: bool) -> MicroBatch:
        """Events as floats, with noise, and labels ``(B,)``, conditions ``(B, K)`` or None."""
        x = model_input(batch, self._pixels(), seed, device)
        label_drop = self._label_drop if training else 0.0
        return x, conditions(batch, label_drop, seed, device) if self._conditional else None

    def forward(self, x: Tensor, y: Tensor | None) -> Float[Tensor, "B F"]:
        """Nats of each image; with ``latent_norm_weight``, the loss and the nats."""
        self._squares.clear()
        z, log_det = self.model(x, y, dequantize=True)  # checks of log_prob_of_images would synchronize with the device
        nats = -(standard_normal_log_prob(z) + log_det)
        if not self._latent_norm_weight:
            return nats[:, None]
        loss = nats + self._latent_norm_weight * self.num_dims * sum(self._squares)
        return torch.stack([loss, nats.detach()], dim=1)

    def record(self, values: Values | None) -> dict[str, float | None]:
        """Nats per dimension; bits/dim, or None if there is no uniform dequantization."""
        if values is None:
            return {"nats_per_dim": None, "bits_per_dim": None}
        nats = values[1] / self.num_dims if self._latent_norm_weight else values[0]
        pixels = self._pixels()
        bits = nats / math.log(2) + pixels.bit_depth - 1 if pixels.noise == "uniform" else None
        return {"nats_per_dim": nats, "bits_per_dim": bits}

    def _pixels(self) -> PixelFormat:
        assert self.model.pixels is not None
        return self.model.pixels

    def initialize(self, batch: Batch, micro_batch_size: int, seed: int, device: torch.device) -> None:
        """Initialize the flow from one micro batch of every rank."""
        x, y = self.inputs(batch[:micro_batch_size], seed, device, training=False)
        assert x is not None
        self.model.train().initialize(x, y)

    def diagnostics(self) -> dict[str, float]:
        """Diagnostics of the flow."""
        return self.model.diagnostics()
