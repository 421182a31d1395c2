"""Run layers in sequence and choose how the backward pass gets their activations: less memory for more time.

* ``keep``: autograd keeps them all. Memory grows with the number of layers.
* ``checkpoint``: the inputs of groups of layers are kept and each group runs forward again (Chen et al.,
  arXiv 1604.06174): memory for the activations of one group and one feature map per group; about 4/3 of the time.
* ``rebuild``: only outputs are kept, one every ``anchor_every`` groups (an anchor); the backward pass walks from an
  anchor down, inverting a few layers at a time (Gomez et al., arXiv 1707.04585). Memory does not grow with depth,
  except for one feature map per anchor. Rounding errors of the inverses add up between anchors only. Gradients of
  parameters are added to ``.grad`` by ``backward()``; ``torch.autograd.grad`` with respect to parameters finds none.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from tarflow_scale.config.model import Activations
from tarflow_scale.flows.coupling import Coupling, Layer, Leaves

__all__ = ["ANCHOR_EVERY", "checkpoint", "rebuild_run", "run_layers"]

Group = Sequence[Layer]

ANCHOR_EVERY = 8
"""Groups between anchors: so few anchors cost little memory, and the rounding errors of 8 inverses are small."""


def checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``; the backward pass computes its activations again, with equal autocast and dropout."""
    return torch_checkpoint(function, *arguments, use_reentrant=False)


def run_layers(
    groups: Sequence[Group], h: Tensor, activations: Activations = "keep", anchor_every: int = ANCHOR_EVERY
) -> tuple[Tensor, Tensor]:
    """Map ``h (B, C, H, W)`` through all layers of all groups, in order.

    Args:
        groups: groups of layers; one group is checkpointed at a time, and anchors are counted in groups.
        h: input.
        activations: what the backward pass does.
        anchor_every: groups between anchors, for ``rebuild``.

    Returns:
        The output and the log-determinant ``(B,)``.
    """
    log_det = h.new_zeros(len(h))
    recompute = torch.is_grad_enabled() and activations != "keep"
    if recompute and activations == "rebuild":
        for low in range(0, len(groups), anchor_every):
            layers = tuple(itertools.chain.from_iterable(groups[low : low + anchor_every]))
            # Autograd calls backward only if an input requires a gradient, and the first h, an image, does not.
            token = torch.zeros((), device=h.device, requires_grad=True)
            h, segment_log_det = _Rebuilt.apply(layers, token, h)  # pyright: ignore[reportGeneralTypeIssues]
            log_det = log_det + segment_log_det
        return h, log_det
    for group in groups:
        h, group_log_det = checkpoint(_run, group, h) if recompute else _run(group, h)
        log_det = log_det + group_log_det
    return h, log_det


def _run(layers: Sequence[Layer], h: Tensor) -> tuple[Tensor, Tensor]:
    log_det = h.new_zeros(len(h))
    for layer in layers:
        h, layer_log_det = layer(h)
        log_det = log_det + layer_log_det
    return h, log_det


class _Rebuilt(torch.autograd.Function):
    """A run of layers whose backward pass needs only their output.

    The inner backward passes are re-entrant: they accumulate into the parameters themselves, where DDP and ZeRO have
    their hooks, instead of returning gradients, which for a gathered ZeRO-3 parameter would go nowhere.
    """

    @staticmethod
    def forward(ctx: Any, layers: tuple[Layer, ...], token: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        ctx.layers = layers
        ctx.autocast = _autocast_now(h.device.type)
        h, log_det = _run(layers, h)
        ctx.save_for_backward(h)
        return h, log_det

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None, Tensor]:
        if torch.is_grad_enabled():  # with create_graph=True; gradients of the leaves below have no graph
            raise ValueError("second derivatives need activations that are kept (got rebuild); set activations to keep")
        gradient, log_det_gradient = gradients
        (h,) = ctx.saved_tensors
        h = h.detach()
        for layers in _backward_runs(ctx.layers):
            with torch.enable_grad(), ctx.autocast():
                leaves, again, log_det = rebuild_run(layers, h)
            outputs = [(again, gradient), (log_det, log_det_gradient)]
            outputs = [(value, grad) for value, grad in outputs if value.requires_grad]
            torch.autograd.backward([value for value, _ in outputs], [grad for _, grad in outputs])
            h = torch.cat([leaf.detach() for leaf in leaves], dim=1)
            gradient = torch.cat([leaf.grad for leaf in leaves], dim=1)  # pyright: ignore[reportArgumentType]
        return None, None, gradient


def _backward_runs(layers: Sequence[Layer]) -> Iterator[tuple[Layer, ...]]:
    """Layers from last to first: couplings alone, and the layers between two couplings together in forward order.

    The latter are cheap, so one inner backward pass for all of them saves calls.
    """
    for is_coupling, run in itertools.groupby(reversed(layers), key=lambda layer: isinstance(layer, Coupling)):
        if is_coupling:
            yield from ((layer,) for layer in run)
        else:
            yield tuple(reversed(list(run)))


def rebuild_run(layers: Sequence[Layer], h: Tensor) -> tuple[Leaves, Tensor, Tensor]:
    """`Coupling.rebuild` for one coupling, and its equivalent for a run of other layers."""
    if isinstance(layers[0], Coupling):
        return layers[0].rebuild(h)
    with torch.no_grad():
        for layer in reversed(layers):
            h = layer.inverse(h)
    h.requires_grad_()
    return (h,), *_run(layers, h)


def _autocast_now(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The autocast state of the forward pass: CUDA runs the backward pass in another thread, without this state."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)
