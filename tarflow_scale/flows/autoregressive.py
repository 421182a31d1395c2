"""Masked and inverse autoregressive flows on flattened events, with zuko's masked networks.

A masked network computes the shift and scale of each dimension from the dimensions before it,

    v_i = u_i exp(a_i) + b_i,        a_i, b_i = network(u_1 .. u_(i-1)),        log|dv/du| = sum a

and each transformation reads the dimensions in the reverse order of the previous one. One pass of the network computes
all ``v`` from ``u``; the inverse computes one dimension of ``u`` after the other, in D passes.

* MAF (Papamakarios et al., arXiv 1705.07057): ``u`` is the data. A density takes one pass, a sample D passes.
* IAF (Kingma et al., arXiv 1606.04934): ``v`` is the data. A sample takes one pass, the density of given data D
  passes. IAF suits variational inference, which needs densities only of samples that the flow has drawn.

Every dimension of the data corresponds to one dimension of the noise, so each dimension has a log-determinant: the sum
of its ``a`` over all transformations.

Every network also reads a row of a learned table, selected by the label; a dropped label reads the mean of all rows.
There is no batch normalisation between transformations. Networks compute in fp32 or wider, also under autocast.

Shapes: B batch, D dimensions. log_det: nats, summed over dimensions.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import IAFConfig, MAFConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.errors import ConfigError, needs_package
from tarflow_scale.flows.conditions import Condition, GivenCondition, embed
from tarflow_scale.flows.flow import Flow
from tarflow_scale.flows.logits import from_logits, logit_log_dets

__all__ = ["Autoregressive"]


class Autoregressive(Flow):
    """A MAF or an IAF.

    Args:
        event_shape: shape of an image or vector of at least two dimensions.
        num_classes: number of classes; None for an unconditional model.
        config: the section ``model``.

    Raises:
        ConfigError: zuko is not installed.
        ValueError: the event has one dimension, or a hidden layer is too narrow to read all dimensions.
    """

    capabilities = MAFConfig.CAPABILITIES

    def __init__(self, event_shape: tuple[int, ...], num_classes: int | None, config: MAFConfig | IAFConfig) -> None:
        super().__init__(event_shape, num_classes, config.logit_alpha)
        if self.num_dims < 2:
            raise ValueError(
                f"an autoregressive flow needs at least 2 dimensions (got {self.num_dims}); use another model"
            )
        needed = self.num_dims - 1 + bool(num_classes)
        if min(config.hidden_widths) < needed:  # with fewer units the network would not read some inputs
            raise ValueError(
                f"model.hidden_widths must be at least {needed} for {self.num_dims} dimensions, one unit for each "
                f"input (got {list(config.hidden_widths)}); raise them"
            )
        try:
            with torch.device("cpu"):
                from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        except ImportError as error:
            raise ConfigError(needs_package(f"model.kind={config.kind}", "zuko", "flows")) from error
        self.inverse_autoregressive = config.kind == "iaf"
        orders = (torch.arange(self.num_dims, device="cpu"), torch.arange(self.num_dims, device="cpu").flip(0))
        with torch.device("cpu"):  # masks are computed, and the meta device computes nothing
            self.transforms = nn.ModuleList(
                MaskedAutoregressiveTransform(
                    self.num_dims,
                    context=config.label_width if num_classes else 0,
                    order=orders[number % 2],  # pyright: ignore[reportArgumentType]
                    hidden_features=config.hidden_widths,
                )
                for number in range(config.transforms)
            )
        table = None if num_classes is None else torch.randn(num_classes, config.label_width)
        self.class_embedding = None if table is None else nn.Parameter(table)

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats."""
        transform = self._undo_all if self.inverse_autoregressive else self._do_all
        with torch.autocast(h.device.type, enabled=False):
            return transform(h.flatten(1), self._context(y, len(h)))

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """See `Flow.encode_values`."""
        with torch.autocast(h.device.type, enabled=False):
            transforms: list[Any] = list(self.transforms)
            context, values, log_dets = self._context(y, len(h)), h.flatten(1), torch.zeros_like(h).flatten(1)
            for transform in reversed(transforms) if self.inverse_autoregressive else transforms:
                given = transform(context)
                data = values
                values = given.inv(data) if self.inverse_autoregressive else given(data)
                u, v = (values, data) if self.inverse_autoregressive else (data, values)
                more = given.meta(u).base.log_abs_det_jacobian(u, v)  # zuko's transform of each dimension, given u
                log_dets = log_dets - more if self.inverse_autoregressive else log_dets + more
        return values.view(h.shape), log_dets.view(h.shape)

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Map noise to data, without guidance."""
        transform = self._do_all if self.inverse_autoregressive else self._undo_all
        with torch.autocast(z.device.type, enabled=False):
            return transform(z, self._context(y, len(z)))[0].unflatten(1, self.event_shape)

    def inverse_and_log_det(
        self, z: Float[Tensor, "B D"], y: GivenCondition = None
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
        """See `Flow.inverse_and_log_det`; an IAF computes both in one pass."""
        if not self.inverse_autoregressive:
            return super().inverse_and_log_det(z, y)
        with torch.autocast(z.device.type, enabled=False):
            h, log_det = self._do_all(z, self._context(self._labels(y, len(z), z.device), len(z)))
            x = h.unflatten(1, self.event_shape)
            if self.logit_alpha is not None:
                log_det = log_det - logit_log_dets(h, self.logit_alpha).sum(dim=1)
                x = from_logits(x, self.logit_alpha)
        return x, log_det

    def _do_all(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply all transformations; return ``v`` and log|dv/du|."""
        log_det = u.new_zeros(len(u))
        for transform in self.transforms:
            u, more = self.recomputed(_do, transform, u, context)
            log_det = log_det + more
        return u, log_det

    def _undo_all(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the inverses of all transformations; return ``u`` and log|du/dv|."""
        log_det = v.new_zeros(len(v))
        for transform in reversed(list(self.transforms)):
            v, more = self.recomputed(_undo, transform, v, context)
            log_det = log_det + more
        return v, log_det

    def _context(self, y: Condition, num: int) -> Tensor | None:
        return None if self.class_embedding is None else embed(self.class_embedding, y).expand(num, -1)


def _do(transform: Any, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    return transform(context).call_and_ladj(u)


def _undo(transform: Any, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    given = transform(context)
    u = given.inv(v)
    return u, -given.log_abs_det_jacobian(u, v)
