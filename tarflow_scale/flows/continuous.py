"""Continuous flow: data becomes noise along an ordinary differential equation.

Grathwohl et al., "FFJORD: Free-form continuous dynamics for scalable reversible generative models", arXiv 1810.01367.
A network gives the velocity; the log-determinant is the integral of its divergence,

    dh/dt = f(t, h),   h(0) = data, h(1) = z,        log|det dz/dx| = integral of tr(df/dh) dt

The trace is exact, D products with the Jacobian, in evaluation up to ``exact_trace_dims`` dimensions. Elsewhere it is
Hutchinson's estimate e^T (df/dh) e with a probe e of random signs that is drawn once for a whole solve, so that the
solver meets a smooth function: in training from torch's generator, which the loop seeds from (seed, images seen, rank);
in evaluation from a generator that the values of the sample itself seed, so that a number does not depend on the batch
and errors of different images are independent. The estimate is unbiased for log p, and so is a mean over images; its
exponential is not, so that importance-weighted figures and sums over labels are no bounds where the trace is estimated.

Solvers and the adjoint are torchdiffeq's. Few fixed steps are cheap to train with, but what they compute is neither
inverted by as many steps back nor a density that integrates to one; so likelihoods and samples of a model in evaluation
are always those of an adaptive solver, ``dopri5`` where the solver of training is none. It chooses one step for a whole
batch, so that samples see each other within ``tolerance``; and the inverse is exact to about that. Every layer of the
dynamics is scaled and shifted by time (FFJORD's "concatsquash"), the last starts at zero, and a label is added to the
first.

Shapes: B batch, D dimensions. log_det: nats, summed over dimensions.
"""

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config import Guidance
from tarflow_scale.errors import ConfigError, NumericsError
from tarflow_scale.flows.conditions import Condition, embed
from tarflow_scale.flows.flow import Activations, Flow

__all__ = ["Continuous", "Dynamics"]

_ADAPTIVE = ("dopri5", "bosh3")
_STALLED = 24
"""Evaluations in a row at one time, to rounding, by which a solver is stuck; a step has seven at most."""


class Dynamics(nn.Module):
    """Velocity of every sample at a time: 3x3 convolutions on images, linear layers on vectors.

    Args:
        event_shape: ``(C, H, W)`` or ``(D,)``.
        width: of the hidden layers.
        hidden_layers: how many.
        num_classes: classes, or None.
    """

    def __init__(self, event_shape: tuple[int, ...], width: int, hidden_layers: int, num_classes: int | None) -> None:
        super().__init__()
        self._expanded = (1,) * (len(event_shape) - 1)
        widths = [event_shape[0], *[width] * hidden_layers, event_shape[0]]
        pairs = list(pairwise(widths))
        image = len(event_shape) == 3
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) if image else nn.Linear(a, b) for a, b in pairs)
        self.gates = nn.ModuleList(nn.Linear(1, b) for _, b in pairs)
        self.shifts = nn.ModuleList(nn.Linear(1, b, bias=False) for _, b in pairs)
        self.class_embedding = None if num_classes is None else nn.Parameter(torch.zeros(num_classes, width))
        for parameter in (*self.layers[-1].parameters(), *self.shifts[-1].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, t: Tensor, h: Float[Tensor, "B ..."], y: Condition) -> Float[Tensor, "B ..."]:
        """dh/dt."""
        time = t.reshape(1, 1).to(h.dtype)
        for number, (layer, gate, shift) in enumerate(zip(self.layers, self.gates, self.shifts, strict=True)):
            if number:
                h = F.softplus(h) - math.log(2)
            h = layer(h) * self._over_events(torch.sigmoid(gate(time))) + self._over_events(shift(time))
            if number == 0 and self.class_embedding is not None:
                h = h + self._over_events(embed(self.class_embedding, y))
        return h

    def _over_events(self, values: Float[Tensor, "B C"]) -> Tensor:
        return values.reshape(*values.shape, *self._expanded)


class Continuous(Flow):
    """A flow by a solver.

    Args:
        event_shape: ``(C, H, W)`` or ``(D,)``.
        num_classes: classes, or None for an unconditional model.
        width, hidden_layers: of the dynamics.
        solver: its method; one of fixed steps is for training alone.
        tolerance: relative and absolute, of an adaptive solver.
        num_steps: of a solver of fixed ones.
        gradients: by the adjoint equation or directly.
        exact_trace_dims: up to so many dimensions the trace is exact in evaluation.
        max_evaluations: of the dynamics in a solve.
        logit_alpha: see `Flow`.

    Raises:
        ConfigError: torchdiffeq is not installed.
    """

    activation_choices: ClassVar[tuple[Activations, ...]] = ("keep",)
    takes_guidance = False

    def __init__(
        self,
        event_shape: tuple[int, ...],
        num_classes: int | None,
        *,
        width: int = 64,
        hidden_layers: int = 3,
        solver: Literal["dopri5", "bosh3", "rk4", "midpoint"] = "dopri5",
        tolerance: float = 1e-5,
        num_steps: int = 20,
        gradients: Literal["adjoint", "direct"] = "adjoint",
        exact_trace_dims: int = 64,
        max_evaluations: int = 2000,
        logit_alpha: float | None = None,
    ) -> None:
        super().__init__(event_shape, num_classes, logit_alpha)
        try:
            with torch.device("cpu"):  # a flow is loaded on the meta device, where its tables would be lost
                import torchdiffeq
        except ImportError as error:
            raise ConfigError("model.kind=continuous needs torchdiffeq; pip install 'tarflow-scale[flows]'") from error
        self.dynamics = Dynamics(event_shape, width, hidden_layers, num_classes)
        self.tolerance = tolerance
        self.exact_trace_dims = exact_trace_dims
        self._solver: Any = torchdiffeq.odeint_adjoint if gradients == "adjoint" else torchdiffeq.odeint
        self._method = solver
        self._step_size = 1 / num_steps
        self._gradients = gradients
        self._max_evaluations = max_evaluations
        self._evaluations = {"forward": 0, "backward": 0}

    def diagnostics(self) -> dict[str, float]:
        """Evaluations of the dynamics by the latest `encode`, and by its adjoint once that was solved."""
        return {f"{way}_evaluations": float(number) for way, number in self._evaluations.items()}

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats.

        Raises:
            NumericsError: the solver is stuck, or needs too many evaluations.
        """
        with torch.autocast(h.device.type, enabled=False):
            probe = self._probe(h)
            field = _Field(self, y, lambda v, at, keep: _trace(v, at, probe, keep))
            z, log_det = self._solved(field, (h, h.new_zeros(len(h))), (0.0, 1.0))
        return z.flatten(1), log_det

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Noise to data; there is no guidance.

        Raises:
            NumericsError: as `encode`.
        """
        with torch.autocast(z.device.type, enabled=False):
            field = _Field(self, y, None)
            return self._solved(field, (z.unflatten(1, self.event_shape),), (1.0, 0.0))[0]

    def _probe(self, h: Tensor) -> Tensor | None:
        """Random signs for each sample; None where the trace is exact."""
        if self.training:
            return torch.randint(0, 2, h.shape, device=h.device).to(h.dtype) * 2 - 1
        if self.num_dims <= self.exact_trace_dims:
            return None
        return torch.stack([_signs_of(sample) for sample in h.detach().cpu()]).to(h)

    def _solved(self, field: "_Field", start: tuple[Tensor, ...], times: tuple[float, float]) -> tuple[Tensor, ...]:
        at = torch.tensor(times, dtype=start[0].dtype, device=start[0].device)
        self._evaluations.update(forward=0, backward=0)
        options: dict[str, Any] = {"rtol": self.tolerance, "atol": self.tolerance, "method": self._method}
        if self._gradients == "adjoint":
            options["adjoint_params"] = tuple(self.dynamics.parameters())
        if self._method not in _ADAPTIVE and self.training:
            options["options"] = {"step_size": self._step_size}
        else:
            options["method"] = self._method if self._method in _ADAPTIVE else "dopri5"
            if self._gradients == "adjoint":
                options["adjoint_options"] = {"norm": "seminorm"}  # arXiv 2009.09457
        try:
            found = self._solver(field, start, at, **options)
        except AssertionError as error:  # so torchdiffeq says that a step is too small, or a state not finite
            raise self.stuck(str(error)) from error
        field.forward_is_over = True
        ends = tuple(path[-1] for path in found)
        if self._gradients == "direct" or not torch.is_grad_enabled():
            return ends
        return _FiniteGradients.apply(len(ends), *ends, *self.dynamics.parameters())  # pyright: ignore[reportReturnType]

    def count(self, way: Literal["forward", "backward"]) -> None:
        """Count an evaluation of the dynamics.

        Raises:
            NumericsError: there were too many.
        """
        self._evaluations[way] += 1
        if self._evaluations[way] > self._max_evaluations:
            raise self.stuck(f"more than model.max_evaluations={self._max_evaluations} evaluations")

    @staticmethod
    def stuck(why: str) -> NumericsError:
        """What is raised where the solver does not come through."""
        return NumericsError(
            f"the solver of the continuous flow is stuck ({why}); the dynamics have become stiff: raise "
            f"model.tolerance, use model.solver=rk4, or lower optimizer.peak_lr"
        )


class _Field:
    """The right-hand side for one solve: velocity, and its divergence where that is asked for."""

    def __init__(self, flow: Continuous, y: Condition, trace: Callable[[Tensor, Tensor, bool], Tensor] | None) -> None:
        self._flow = flow
        self._y = y
        self._trace = trace
        self.forward_is_over = False
        self._latest_time = math.nan
        self._stalled = 0

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._flow.count("backward" if self.forward_is_over else "forward")
        self._watch(float(t.detach()))
        if self._trace is None:
            return (self._flow.dynamics(t, state[0], self._y),)
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            h = state[0] if keep_graph and state[0].requires_grad else state[0].detach().requires_grad_()
            velocity = self._flow.dynamics(t, h, self._y)
            divergence = self._trace(velocity, h, keep_graph)
        return (velocity, divergence) if keep_graph else (velocity.detach(), divergence.detach())

    def _watch(self, time: float) -> None:
        """The adjoint is solved inside a backward pass, where nobody else would see that it is stuck."""
        self._stalled = self._stalled + 1 if abs(time - self._latest_time) < 1e-7 else 0
        self._latest_time = time
        if self._stalled >= _STALLED:
            raise self._flow.stuck(f"steps below 1e-7 at time {time:.6f}")


class _FiniteGradients(torch.autograd.Function):
    """The identity on the ends of a solve, whose backward pass keeps what is not finite from the adjoint's solver.

    A solver cannot start from such a gradient. The parameters get NaN in its place, so that the step is skipped.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = tensors[count:]
        return tuple(end.view_as(end) for end in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return (None, *gradients, *[None] * len(ctx.parameters))
        nans = [torch.full_like(parameter, math.nan) for parameter in ctx.parameters]
        return (None, *[torch.zeros_like(gradient) for gradient in gradients], *nans)


def _signs_of(sample: Tensor) -> Tensor:
    """Random signs that the values of a sample on the CPU decide."""
    digest = hashlib.sha256(sample.contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randint(0, 2, sample.shape, generator=generator) * 2 - 1


def _trace(velocity: Tensor, h: Tensor, probe: Tensor | None, keep_graph: bool) -> Float[Tensor, " B"]:
    """Trace of d velocity / d h of each sample; estimated if there is a probe."""

    def product(along: Tensor) -> Tensor:
        return torch.autograd.grad(velocity, h, along, retain_graph=True, create_graph=keep_graph)[0].flatten(1)

    if probe is not None:
        return (product(probe) * probe.flatten(1)).sum(dim=1)
    units = torch.eye(velocity[0].numel(), dtype=velocity.dtype, device=velocity.device)
    rows = [product(unit.view(velocity[:1].shape).expand_as(velocity))[:, i] for i, unit in enumerate(units)]
    return torch.stack(rows, dim=1).sum(dim=1)
