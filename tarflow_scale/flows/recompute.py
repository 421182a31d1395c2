"""Run layers in sequence, and keep, recompute or rebuild their activations for the backward pass.

* ``keep``: autograd keeps all activations. Memory grows with the number of layers.
* ``checkpoint``: only the inputs of groups of layers are kept, and the backward pass runs each group forward again
  (Chen et al., arXiv 1604.06174). It needs memory for the activations of one group and for one feature map per group,
  and takes about 4/3 of the time of ``keep``.
* ``rebuild``: only the output after every `ANCHOR_EVERY` groups is kept; it is called an anchor. The backward pass
  starts at an anchor and inverts a few layers at a time (Gomez et al., arXiv 1707.04585). Memory grows only by one
  feature map per anchor. Rounding errors of inverses add up only between two anchors. ``backward()`` adds gradients of
  parameters to ``.grad``; ``torch.autograd.grad`` gives no gradients of parameters.
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
"""Number of groups of layers per anchor; with 8, anchors need little memory and rounding errors stay small."""


def checkpoint(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function(*arguments)``; the backward pass recomputes activations with the same autocast and dropout."""
    return torch_checkpoint(function, *arguments, use_reentrant=False)


def run_layers(groups: Sequence[Group], h: Tensor, activations: Activations = "keep") -> tuple[Tensor, Tensor]:
    """Map ``h (B, C, H, W)`` through all layers of all groups, in order.

    Args:
        groups: groups of layers; each group is checkpointed separately.
        h: the input of the first layer.
        activations: how the backward pass gets its activations.

    Returns:
        The output and the log-determinant ``(B,)``.
    """
    log_det = h.new_zeros(len(h))
    recompute = torch.is_grad_enabled() and activations != "keep"
    if recompute and activations == "rebuild":
        for low in range(0, len(groups), ANCHOR_EVERY):
            layers = tuple(itertools.chain.from_iterable(groups[low : low + ANCHOR_EVERY]))
            # Autograd calls backward only if an input requires a gradient. The first h, an image, does not; this does.
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
    """A sequence of layers whose backward pass needs only their output.

    The inner backward passes are re-entrant. They add gradients to the parameters directly, where DDP and ZeRO have
    their hooks. If `backward` returned them instead, those of a gathered ZeRO-3 parameter would be lost.
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
            raise ValueError("second derivatives need activations=keep (got rebuild); set flow.activations = 'keep'")
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
    """Yield runs of layers, last run first. A run is one coupling, or all layers between two couplings.

    Layers in a run are in forward order. Layers between couplings are cheap, so they share one inner backward pass.
    """
    for is_coupling, run in itertools.groupby(reversed(layers), key=lambda layer: isinstance(layer, Coupling)):
        if is_coupling:
            yield from ((layer,) for layer in run)
        else:
            yield tuple(reversed(list(run)))


def rebuild_run(layers: Sequence[Layer], h: Tensor) -> tuple[Leaves, Tensor, Tensor]:
    """Call `Coupling.rebuild` if the run is a single coupling, or do the same for a run of other layers."""
    if isinstance(layers[0], Coupling):
        return layers[0].rebuild(h)
    with torch.no_grad():
        for layer in reversed(layers):
            h = layer.inverse(h)
    h.requires_grad_()
    return (h,), *_run(layers, h)


def _autocast_now(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return a function that makes contexts with the present autocast state; CUDA's backward thread lacks it."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)
