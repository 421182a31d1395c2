"""Continuous flow: data becomes noise along an ordinary differential equation.

Grathwohl et al., "FFJORD: Free-form continuous dynamics for scalable reversible generative models", arXiv 1810.01367.
A network gives the velocity; the log-determinant is the integral of its divergence,

    dh/dt = f(t, h),   h(0) = data, h(1) = z,        log|det dz/dx| = integral of tr(df/dh) dt

In evaluation the trace is exact up to ``exact_trace_dims`` dimensions. It is computed by forward-mode products with the
Jacobian, one for each dimension of a vector, many at once. In an image, places that no layer connects share a product
(grouped as in Curtis, Powell and Reid, "On the estimation of sparse Jacobian matrices", 1974), so that L convolutions
need (L + 1)^2 C products for an image of any size. Each value then has its own log-determinant, the integral of its
entry on the diagonal of the Jacobian, which `Flow.nats_of_values` uses. Otherwise the trace is Hutchinson's estimate
e^T (df/dh) e with a probe e of random signs, drawn once for a whole solve, so that the solver sees a smooth function.
In training the probe comes from torch's generator, which the loop seeds from (seed, images seen, rank); in evaluation
from a generator seeded by the values of the sample, so that a number does not depend on the batch and errors of
different images are independent. The estimate is unbiased for log p, and so is a mean over images. Its exponential is
biased, so importance-weighted figures and sums over labels are no bounds where the trace is estimated.

Solvers and the adjoint are torchdiffeq's. A few fixed steps are cheap to train with, but the same number of steps back
does not invert them, and their density does not integrate to one. So likelihoods and samples in evaluation always come
from an adaptive solver: ``dopri5`` where training uses fixed steps. It chooses one step size for a whole batch from the
mean error, so a sample depends on the rest of its batch within ``tolerance``. Its first step is the whole interval,
which smooth dynamics accept, and its last step ends where the integral does; torchdiffeq by itself would step past the
end and interpolate back, without an error estimate.

Accuracy at the tolerance of 1e-5, against a solver of 1e-12 and in 4 to 64 dimensions: seven evaluations give log
densities within 1e-5 nats, inverses within 2e-6 and gradients within 3e-6 of the largest; fp32 adds 5e-5 nats. Errors
grow where dynamics stretch: with weights twice as large (25 evaluations) 1e-3 of 64 nats; inverses 3e-4.
Every layer of the dynamics is scaled and shifted by time (FFJORD's "concatsquash"), the last starts at zero, and a
label is added to the first.

Shapes: B batch, D dimensions. log_det: nats, summed over dimensions.
"""

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflow_scale.config.model import ContinuousConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.errors import ConfigError, NumericsError, needs_package
from tarflow_scale.flows.conditions import Condition, embed, is_transformed
from tarflow_scale.flows.flow import Flow

__all__ = ["Continuous", "Dynamics"]

_ADAPTIVE = ("dopri5", "bosh3")
_TANGENTS = {"cpu": 2**19, "cuda": 2**26}
"""Hidden values of all products that are computed together: what fits in a core's cache, and in memory."""
_STALLED = 24
"""So many evaluations in a row at the same time, to rounding, mean that a solver is stuck; a step has at most seven."""


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
        self.event_shape = event_shape
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
        return self._through(t, h, y, [])

    def with_diagonal(
        self, t: Tensor, h: Float[Tensor, "B ..."], y: Condition
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
        """dh/dt, and the diagonal of its Jacobian."""
        hidden: list[Tensor] = []
        velocity = self._through(t, h, y, hidden)
        slopes = [torch.sigmoid(one) for one in hidden]
        gates: list[Tensor] = [torch.sigmoid(gate(t.reshape(1, 1).to(h.dtype)))[0] for gate in self.gates]
        matrices: list[Any] = [layer.weight for layer in self.layers]
        weights = [
            matrix * gate.reshape(-1, *[1] * (matrix.ndim - 1)) for matrix, gate in zip(matrices, gates, strict=True)
        ]
        return velocity, self._diagonal(weights, slopes)

    def _through(self, t: Tensor, h: Tensor, y: Condition, hidden: list[Tensor]) -> Tensor:
        """dh/dt; the input of every nonlinearity is appended to ``hidden``."""
        time = t.reshape(1, 1).to(h.dtype)
        for number, (layer, gate, shift) in enumerate(zip(self.layers, self.gates, self.shifts, strict=True)):
            if number:
                hidden.append(h)
                h = F.softplus(h) - math.log(2)
            h = layer(h) * self._over_events(torch.sigmoid(gate(time))) + self._over_events(shift(time))
            if number == 0 and self.class_embedding is not None:
                h = h + self._over_events(embed(self.class_embedding, y))
        return h

    def _diagonal(self, weights: list[Tensor], slopes: list[Tensor]) -> Float[Tensor, "B ..."]:
        """Diagonal of W_L S_(L-1) W_(L-1) .. S_1 W_1, with the slopes S of every sample.

        The first and last layer are the same for all samples: probes are pushed forward from the first layer and
        multiplied with the last layer's weights at the same places.
        """
        probes = self._probes(slopes[0])
        columns, rows = self._linear(probes, weights[0]), self._transposed(probes, weights[-1])
        together = max(1, _TANGENTS.get(probes.device.type, 2**19) // max(1, slopes[0].numel()))
        diagonal = torch.zeros((), dtype=probes.dtype, device=probes.device)
        for low in range(0, len(probes), together):
            some = slice(low, low + together)
            tangents = columns[some, None] * slopes[0]
            for weight, slope in zip(weights[1:-1], slopes[1:], strict=True):
                tangents = self._linear(tangents.flatten(0, 1), weight).unflatten(0, tangents.shape[:2]) * slope
            met = (tangents * rows[some, None]).sum(dim=2)
            if self._expanded:  # places of a probe are at least three apart, so its products do not overlap
                met = 9 * F.avg_pool2d(met, 3, stride=1, padding=1)
            diagonal = diagonal + (met.unsqueeze(2) * probes[some, None]).sum(dim=0)
        return diagonal

    def _probes(self, like: Tensor) -> Float[Tensor, "K ..."]:
        """Probes of zeros and ones; every value is in one probe, and no two values of a probe depend on each other."""
        if not self._expanded:
            return torch.eye(self.event_shape[0], dtype=like.dtype, device=like.device)
        apart = len(self.layers) + 1
        rows, columns = (torch.eye(min(apart, n)).repeat(1, -(-n // apart))[:, :n] for n in self.event_shape[1:])
        probes = torch.einsum("cd,ih,jw->cijdhw", torch.eye(self.event_shape[0]), rows, columns)
        return probes.flatten(0, 2).to(like)

    def _linear(self, v: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(v, weight, padding=1) if self._expanded else F.linear(v, weight)

    def _transposed(self, v: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(v, weight, padding=1) if self._expanded else v @ weight

    def _over_events(self, values: Float[Tensor, "B C"]) -> Tensor:
        return values.reshape(*values.shape, *self._expanded)


class Continuous(Flow):
    """A flow whose map is the solution of a differential equation.

    Args:
        event_shape: ``(C, H, W)`` or ``(D,)``.
        num_classes: classes, or None for an unconditional model.
        width, hidden_layers: of the dynamics.
        solver: its method; methods of fixed steps are used in training only.
        tolerance: relative and absolute, of an adaptive solver.
        num_steps: of a solver of fixed ones.
        gradients: by the adjoint equation or directly.
        exact_trace_dims: largest number of dimensions whose trace is exact in evaluation.
        max_evaluations: of the dynamics in a solve.
        logit_alpha: see `Flow`.

    Raises:
        ConfigError: torchdiffeq is not installed.
    """

    capabilities = ContinuousConfig.CAPABILITIES

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
            with torch.device("cpu"):  # flows are loaded on the meta device, which would lose these tables
                import torchdiffeq
        except ImportError as error:
            raise ConfigError(needs_package("model.kind=continuous", "torchdiffeq", "flows")) from error
        self.dynamics = Dynamics(event_shape, width, hidden_layers, num_classes)
        self.tolerance = tolerance
        self.exact_trace_dims = exact_trace_dims
        self.gradients: Literal["adjoint", "direct"] = gradients
        """How the backward pass is solved; may be set. Second derivatives need ``direct``."""
        self._solvers: dict[str, Any] = {"adjoint": torchdiffeq.odeint_adjoint, "direct": torchdiffeq.odeint}
        self._method = solver
        self._step_size = 1 / num_steps
        self.max_evaluations = max_evaluations
        self._evaluations = {"forward": 0, "backward": 0}

    def diagnostics(self) -> dict[str, float]:
        """Evaluations of the dynamics in the latest `encode`, and in its adjoint once that is solved."""
        return {f"{way}_evaluations": float(number) for way, number in self._evaluations.items()}

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats.

        Raises:
            NumericsError: the solver is stuck, or needs too many evaluations.
            ValueError: weights of half precision, or a transformation of torch.func.
        """
        with torch.autocast(h.device.type, enabled=False):
            z, log_det = self._solved(self._field(h, y), (h, h.new_zeros(len(h))), (0.0, 1.0))
        return z.flatten(1), log_det

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """As `Flow.encode_values`, with the steps of `encode`.

        Raises:
            ValueError: the trace is estimated.
        """
        if not self.divides_surprise:
            raise ValueError(
                f"surprise is divided by an exact trace, of at most model.exact_trace_dims={self.exact_trace_dims} "
                f"dimensions (got {self.num_dims}); raise it"
            )

        def rates(t: Tensor, at: Tensor) -> tuple[Tensor, ...]:
            velocity, diagonal = self.dynamics.with_diagonal(t, at, y)
            return velocity, diagonal.flatten(1).sum(dim=1), diagonal

        with torch.autocast(h.device.type, enabled=False):
            start = (h, h.new_zeros(len(h)), torch.zeros_like(h))
            z, _, log_dets = self._solved(_Field(self, rates), start, (0.0, 1.0))
        return z, log_dets

    @property
    def divides_surprise(self) -> bool:
        """As `Flow.divides_surprise`: true where the trace is exact."""
        return self.num_dims <= self.exact_trace_dims

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Noise to data; there is no guidance.

        Raises:
            NumericsError: as `encode`.
        """
        with torch.autocast(z.device.type, enabled=False):
            field = _Field(self, lambda t, at: (self.dynamics(t, at, y),))
            return self._solved(field, (z.unflatten(1, self.event_shape),), (1.0, 0.0))[0]

    def _field(self, h: Tensor, y: Condition) -> "_Field":
        """Velocity and divergence, from ``h`` on."""
        probe = self._probe(h)

        def exact(t: Tensor, at: Tensor) -> tuple[Tensor, ...]:
            velocity, diagonal = self.dynamics.with_diagonal(t, at, y)
            return velocity, diagonal.flatten(1).sum(dim=1)

        return _Field(self, exact if probe is None else lambda t, at: _estimated(self.dynamics, t, at, y, probe))

    def _probe(self, h: Tensor) -> Tensor | None:
        """Random signs for each sample; None where the trace is exact."""
        if self.training:
            return torch.randint(0, 2, h.shape, device=h.device).to(h.dtype) * 2 - 1
        if self.num_dims <= self.exact_trace_dims:
            return None
        return torch.stack([_signs_of(sample) for sample in h.detach().cpu()]).to(h)

    def _solved(self, field: "_Field", start: tuple[Tensor, ...], times: tuple[float, float]) -> tuple[Tensor, ...]:
        _check_solvable(start[0])
        at = torch.tensor(times, dtype=start[0].dtype, device=start[0].device)
        gradients, self._evaluations = self.gradients, field.evaluations
        options: dict[str, Any] = {"rtol": self.tolerance, "atol": self.tolerance, "method": self._method}
        if gradients == "adjoint":
            options["adjoint_params"] = tuple(self.dynamics.parameters())
        if self._method not in _ADAPTIVE and self.training:
            options["options"] = {"step_size": self._step_size}
        else:
            options["method"] = self._method if self._method in _ADAPTIVE else "dopri5"
            options["options"] = {"norm": _mean_error, "first_step": 1.0, "step_t": at[1:]}
            if gradients == "adjoint":  # the seminorm: arXiv 2009.09457
                begin = at[:1] if times[0] < times[1] else -at[:1]  # torchdiffeq's internal time always increases
                options["adjoint_options"] = {"norm": "seminorm", "first_step": 1.0, "step_t": begin}
        try:
            found = self._solvers[gradients](field, start, at, **options)
        except AssertionError as error:  # torchdiffeq: the step is too small, or the state not finite
            raise self.stuck(str(error)) from error
        field.forward_is_over = True
        ends = tuple(path[-1] for path in found)
        if gradients == "direct" or not torch.is_grad_enabled():
            return ends
        return _FiniteGradients.apply(len(ends), *ends, *self.dynamics.parameters())  # pyright: ignore[reportReturnType]

    @staticmethod
    def stuck(why: str) -> NumericsError:
        """The error that is raised where the solver fails."""
        return NumericsError(
            f"the solver of the continuous flow is stuck ({why}); the dynamics have become stiff: raise "
            f"model.tolerance, use model.solver=rk4, or lower optimizer.peak_lr"
        )


class _Field:
    """The right-hand side for one solve: rates of its states, of which the first is ``h``.

    It counts its own evaluations, because threads may share a flow.
    """

    def __init__(self, flow: Continuous, rates: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        self._flow = flow
        self._rates = rates
        self.forward_is_over = False
        self.evaluations = {"forward": 0, "backward": 0}
        self._latest_time = math.nan
        self._stalled = 0

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        way = "backward" if self.forward_is_over else "forward"
        self.evaluations[way] += 1
        if self.evaluations[way] > self._flow.max_evaluations:
            raise self._flow.stuck(f"more than model.max_evaluations={self._flow.max_evaluations} evaluations")
        self._watch(float(t.detach()))
        return self._rates(t, state[0])

    def _watch(self, time: float) -> None:
        """Raise an error if the solver makes no progress; inside a backward pass nothing else would detect it."""
        self._stalled = self._stalled + 1 if abs(time - self._latest_time) < 1e-7 else 0
        self._latest_time = time
        if self._stalled >= _STALLED:
            raise self._flow.stuck(f"steps below 1e-7 at time {time:.6f}")


class _FiniteGradients(torch.autograd.Function):
    """The identity on the results of a solve; its backward pass withholds non-finite gradients from the adjoint.

    The solver cannot start from such a gradient. The parameters get NaN gradients instead, so that the step is skipped.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = tensors[count:]
        return tuple(end.view_as(end) for end in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # with create_graph=True; what the adjoint's solver computes has no derivatives
            raise ValueError(
                "second derivatives of a continuous flow need the solver's own operations (got model.gradients="
                "adjoint); set flow.gradients = 'direct'"
            )
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return (None, *gradients, *[None] * len(ctx.parameters))
        nans = [torch.full_like(parameter, math.nan) for parameter in ctx.parameters]
        return (None, *[torch.zeros_like(gradient) for gradient in gradients], *nans)


def _check_solvable(h: Tensor) -> None:
    if h.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"the solver of a continuous flow needs fp32 or fp64 (got {h.dtype}); use flow.float()")
    if is_transformed():
        raise ValueError(
            "the solver of a continuous flow chooses steps by values, which vmap and torch.func hide (got one of "
            "them); give it the whole batch, and use torch.autograd for derivatives"
        )


def _signs_of(sample: Tensor) -> Tensor:
    """Random signs that the values of a sample on the CPU decide."""
    digest = hashlib.sha256(sample.contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randint(0, 2, sample.shape, generator=generator) * 2 - 1


def _estimated(
    dynamics: Dynamics, t: Tensor, h: Tensor, y: Condition, probe: Tensor
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]:
    """Velocity, and Hutchinson's estimate of its divergence."""
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        h = h if keep_graph and h.requires_grad else h.detach().requires_grad_()
        velocity = dynamics(t, h, y)
        (product,) = torch.autograd.grad(velocity, h, probe, create_graph=keep_graph)
        divergence = (product * probe).flatten(1).sum(dim=1)
    return (velocity, divergence) if keep_graph else (velocity.detach(), divergence.detach())


def _mean_error(states: tuple[Tensor, ...]) -> Tensor:
    """Norm by which steps are chosen, torchdiffeq's own, of ``h`` and its log-determinant alone.

    What else is integrated beside them so changes no step.
    """
    return torch.stack([state.square().mean().sqrt() for state in states[:2]]).max()
