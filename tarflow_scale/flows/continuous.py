"""Continuous flow: an ordinary differential equation turns data into noise.

Grathwohl et al., "FFJORD: Free-form continuous dynamics for scalable reversible generative models", arXiv 1810.01367.
A network computes the velocity; the log-determinant is the integral of the divergence of the velocity,

    dh/dt = f(t, h),   h(0) = data, h(1) = z,        log|det dz/dx| = integral of tr(df/dh) dt

In evaluation the trace is exact up to ``exact_trace_dims`` dimensions. It is computed from forward-mode products with
the Jacobian, in batches. A vector needs one product for each dimension. In an image, pixels that are too far apart to
influence each other share a product (Curtis, Powell and Reid, "On the estimation of sparse Jacobian matrices", 1974),
so that L convolutions need (L + 1)^2 C products for an image of any size. If the trace is exact, each value has a
log-determinant, the integral of its entry on the diagonal of the Jacobian; `Flow.nats_of_values` uses it.

In higher dimensions, and in training, the trace is Hutchinson's estimate e^T (df/dh) e with a probe e of random signs.
The probe is drawn once for a whole solve, so that the solver integrates a smooth function. In training it comes from
torch's generator, which the loop seeds from (seed, images seen, rank). In evaluation it comes from a generator seeded
by the values of the sample, so that a result does not depend on the batch and errors of different images are
independent. The estimate of log p is unbiased, and so is a mean over images. The exponential of the estimate is biased,
so importance-weighted numbers and sums over labels are not bounds if the trace is estimated.

The solvers and the adjoint come from torchdiffeq. Training with a few fixed steps is cheap, but the same number of
steps in the other direction does not invert them, and the density does not integrate to one. So evaluation always uses
an adaptive solver, ``dopri5`` if training uses fixed steps. It chooses one step size for a whole batch from the mean
error, so the results of a sample depend on the rest of its batch, within ``tolerance``. The solver first tries one step
over the whole interval and accepts it if the dynamics are smooth. The last step ends exactly at the end of the
interval; by default torchdiffeq would step past the end and interpolate back, without an error estimate.

Accuracy at a tolerance of 1e-5, compared with 1e-12, in 4 to 64 dimensions: a solve takes seven evaluations. Errors are
below 1e-5 nats in log densities, 2e-6 in inverses and, relative to the largest gradient, 3e-6 in gradients; fp32 adds
5e-5 nats. Errors grow with the weights. If the weights are doubled, a solve takes 25 evaluations, and errors are 1e-3
nats in log densities of 64 nats and 3e-4 in inverses.

Every layer of the dynamics is scaled and shifted by functions of time (FFJORD's "concatsquash"), the last layer starts
at zero, and the label's embedding is added to the output of the first layer.

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
"""Maximum size of a hidden layer in a batch of Jacobian products, so that its values fit in CPU cache or GPU memory."""
_STALLED = 24
"""A solver is stuck if it makes this many evaluations in a row at about the same t; one step takes at most 7."""


class Dynamics(nn.Module):
    """The network that computes the velocity: 3x3 convolutions for images, linear layers for vectors.

    Args:
        event_shape: ``(C, H, W)`` or ``(D,)``.
        width: number of channels or units of each hidden layer.
        hidden_layers: number of hidden layers.
        num_classes: number of classes, or None.
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
        """The velocity dh/dt."""
        return self._through(t, h, y, [])

    def with_diagonal(
        self, t: Tensor, h: Float[Tensor, "B ..."], y: Condition
    ) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
        """The velocity dh/dt, and the diagonal of its Jacobian."""
        hidden: list[Tensor] = []
        velocity = self._through(t, h, y, hidden)
        slopes = [torch.sigmoid(before) for before in hidden]
        gates: list[Tensor] = [torch.sigmoid(gate(t.reshape(1, 1).to(h.dtype)))[0] for gate in self.gates]
        matrices: list[Any] = [layer.weight for layer in self.layers]
        weights = [
            matrix * gate.reshape(-1, *[1] * (matrix.ndim - 1)) for matrix, gate in zip(matrices, gates, strict=True)
        ]
        return velocity, self._diagonal(weights, slopes)

    def _through(self, t: Tensor, h: Tensor, y: Condition, hidden: list[Tensor]) -> Tensor:
        """Return the velocity dh/dt, and append the input of every nonlinearity to ``hidden``."""
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
        """The diagonal of W_L S_(L-1) W_(L-1) .. S_1 W_1, with the slopes S of the nonlinearities.

        Slopes differ between samples, but weights do not. So the products of the probes with the first layer (forward)
        and the last layer (backward) are computed only once for all samples.
        """
        probes = self._probes(slopes[0])
        columns, rows = self._linear(probes, weights[0]), self._transposed(probes, weights[-1])
        together = max(1, _TANGENTS.get(probes.device.type, 2**19) // max(1, slopes[0].numel()))
        diagonal = torch.zeros((), dtype=probes.dtype, device=probes.device)
        for low in range(0, len(probes), together):
            part = slice(low, low + together)
            tangents = columns[part, None] * slopes[0]
            for weight, slope in zip(weights[1:-1], slopes[1:], strict=True):
                tangents = self._linear(tangents.flatten(0, 1), weight).unflatten(0, tangents.shape[:2]) * slope
            products = (tangents * rows[part, None]).sum(dim=2)
            if self._expanded:  # places of a probe are at least three apart, so their products do not overlap
                products = 9 * F.avg_pool2d(products, 3, stride=1, padding=1)
            diagonal = diagonal + (products.unsqueeze(2) * probes[part, None]).sum(dim=0)
        return diagonal

    def _probes(self, like: Tensor) -> Float[Tensor, "K ..."]:
        """Vectors of zeros and ones. Each position is 1 in one probe; positions that share a probe do not interact."""
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
        num_classes: number of classes; None for an unconditional model.
        config: the section ``model``.

    Raises:
        ConfigError: torchdiffeq is not installed.
    """

    capabilities = ContinuousConfig.CAPABILITIES

    def __init__(self, event_shape: tuple[int, ...], num_classes: int | None, config: ContinuousConfig) -> None:
        super().__init__(event_shape, num_classes, config.logit_alpha)
        try:
            with torch.device("cpu"):  # on the meta device, where flows are loaded, its tables would be empty
                import torchdiffeq
        except ImportError as error:
            raise ConfigError(needs_package("model.kind=continuous", "torchdiffeq", "flows")) from error
        self.dynamics = Dynamics(event_shape, config.width, config.hidden_layers, num_classes)
        self.tolerance = config.tolerance
        self.exact_trace_dims = config.exact_trace_dims
        self.gradients: Literal["adjoint", "direct"] = config.gradients
        """Method of the backward pass; may be changed. Second derivatives need ``direct``."""
        self._solvers: dict[str, Any] = {"adjoint": torchdiffeq.odeint_adjoint, "direct": torchdiffeq.odeint}
        self._method = config.solver
        self._step_size = 1 / config.num_steps
        self.max_evaluations = config.max_evaluations
        self._evaluations = {"forward": 0, "backward": 0}

    def diagnostics(self) -> dict[str, float]:
        """Number of evaluations of the dynamics in the latest solve, and in its adjoint solve if that has run."""
        return {f"{direction}_evaluations": float(number) for direction, number in self._evaluations.items()}

    def encode(self, h: Tensor, y: Condition) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Map data to noise: ``z (B, D)`` and ``log_det (B,)`` in nats.

        Raises:
            NumericsError: the solver is stuck, or needs too many evaluations.
            ValueError: the weights have half precision, or a transformation of torch.func is active.
        """
        with torch.autocast(h.device.type, enabled=False):
            z, log_det = self._solved(self._field(h, y), (h, h.new_zeros(len(h))), (0.0, 1.0))
        return z.flatten(1), log_det

    def encode_values(self, h: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        """See `Flow.encode_values`; the solver takes the same steps as in `encode`.

        Raises:
            ValueError: the trace is estimated.
        """
        if not self.divides_surprise:
            raise ValueError(
                f"surprise needs an exact trace, which is limited to model.exact_trace_dims={self.exact_trace_dims} "
                f"dimensions (got {self.num_dims}); raise flow.exact_trace_dims"
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
        """See `Flow.divides_surprise`: true if the trace is exact."""
        return self.num_dims <= self.exact_trace_dims

    def decode(self, z: Float[Tensor, "B D"], y: Condition, guidance: Guidance | None) -> Tensor:
        """Map noise to data, without guidance; raises NumericsError like `encode`."""
        with torch.autocast(z.device.type, enabled=False):
            field = _Field(self, lambda t, at: (self.dynamics(t, at, y),))
            return self._solved(field, (z.unflatten(1, self.event_shape),), (1.0, 0.0))[0]

    def _field(self, h: Tensor, y: Condition) -> "_Field":
        """A `_Field` that returns velocity and divergence, for a solve that starts at ``h``."""
        probe = self._probe(h)

        def exact(t: Tensor, at: Tensor) -> tuple[Tensor, ...]:
            velocity, diagonal = self.dynamics.with_diagonal(t, at, y)
            return velocity, diagonal.flatten(1).sum(dim=1)

        return _Field(self, exact if probe is None else lambda t, at: _estimated(self.dynamics, t, at, y, probe))

    def _probe(self, h: Tensor) -> Tensor | None:
        """Random signs for each sample; None if the trace is exact."""
        if self.training:
            return torch.randint(0, 2, h.shape, device=h.device).to(h.dtype) * 2 - 1
        if self.divides_surprise:
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
            paths = self._solvers[gradients](field, start, at, **options)
        except AssertionError as error:  # from torchdiffeq: the step is too small, or the state is not finite
            raise self.stuck(str(error)) from error
        field.forward_is_over = True
        ends = tuple(path[-1] for path in paths)
        if gradients == "direct" or not torch.is_grad_enabled():
            return ends
        return _FiniteGradients.apply(len(ends), *ends, *self.dynamics.parameters())  # pyright: ignore[reportReturnType]

    @staticmethod
    def stuck(reason: str) -> NumericsError:
        """Create the error for a solver that fails."""
        return NumericsError(
            f"the solver of the continuous flow is stuck ({reason}); the dynamics have become stiff: raise "
            f"model.tolerance, use model.solver=rk4, or lower optimizer.peak_lr"
        )


class _Field:
    """The right-hand side of the equation for one solve: the time derivatives of ``h`` and of any other states.

    Evaluations are counted here and not in the flow, because threads may share a flow.
    """

    def __init__(self, flow: Continuous, rates: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        self._flow = flow
        self._rates = rates
        self.forward_is_over = False
        self.evaluations = {"forward": 0, "backward": 0}
        self._latest_time = math.nan
        self._stalled = 0

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        direction = "backward" if self.forward_is_over else "forward"
        self.evaluations[direction] += 1
        if self.evaluations[direction] > self._flow.max_evaluations:
            raise self._flow.stuck(f"more than model.max_evaluations={self._flow.max_evaluations} evaluations")
        time = float(t.detach())
        # Nothing else would detect that the solver makes no progress inside a backward pass.
        self._stalled = self._stalled + 1 if abs(time - self._latest_time) < 1e-7 else 0
        self._latest_time = time
        if self._stalled >= _STALLED:
            raise self._flow.stuck(f"steps smaller than 1e-7 at time {time:.6f}")
        return self._rates(t, state[0])


class _FiniteGradients(torch.autograd.Function):
    """The identity on the results of a solve; its backward pass replaces non-finite gradients.

    The adjoint solve cannot start from non-finite gradients. It gets zeros instead, and the parameters get NaN, so that
    training skips the step.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = tensors[count:]
        return tuple(end.view_as(end) for end in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # with create_graph=True; the results of the adjoint solve have no derivatives
            raise ValueError(
                "gradients=adjoint cannot be differentiated again (got a second derivative of a continuous flow); set "
                "flow.gradients = 'direct'"
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
            "a continuous flow must not be called inside vmap or torch.func, which hide the values that the solver "
            "reads (got a call inside one of them); pass the whole batch, and use torch.autograd for derivatives"
        )


def _signs_of(sample: Tensor) -> Tensor:
    """Random signs in the shape of a CPU sample, from a generator that is seeded by the sample's values."""
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
    """The error norm from which the solver chooses its steps: torchdiffeq's norm of ``h`` and the log-determinant.

    States after these two are integrated too, but do not change the steps.
    """
    return torch.stack([state.square().mean().sqrt() for state in states[:2]]).max()
