"""Variational inference: fit a flow to the posterior of a model whose joint density can be evaluated.

The flow q is fitted by maximising the evidence lower bound (Rezende and Mohamed, arXiv 1505.05770),

    ELBO = E_q [log p(x, data) - log q(x)] = log p(data) - KL(q || posterior)

with reparametrised samples. Importance weights w = p(x, data) / q(x) measure the quality of the fit. The bound
log mean w is tighter than the ELBO (Burda et al., arXiv 1509.00519). The effective sample size is the number of exact
posterior draws that would be as accurate as the weighted draws. These figures are reliable if a generalised Pareto
distribution, fitted to the largest weights, has a shape k below 0.7 (Vehtari et al., arXiv 1507.02646).

    posterior = fit_posterior(log_joint, build(IAFConfig(class_conditional=False), (3,)))
    posterior.sample(1000)

An IAF is the best choice of flow, because it draws samples and computes their densities in one pass. If a parameter has
bounds, ``log_joint`` must compute it from an unbounded variable and add the logarithm of the derivative.

Shapes: S samples, D dimensions. Densities and bounds: nats.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tarflow_scale.errors import NumericsError
from tarflow_scale.flows import Flow
from tarflow_scale.runtime import console

__all__ = ["ImportanceDiagnostics", "Posterior", "fit_posterior", "pareto_shape"]

LogJoint = Callable[[Tensor], Tensor]
"""Maps ``x (S, D)`` to log p(x, data) ``(S,)`` in nats, including all constants, which are part of the evidence."""

_MOST_SKIPPED = 10
_FINAL_RATE = 0.01
_SMOOTHED_SHARE = 0.2


@dataclass(frozen=True)
class ImportanceDiagnostics:
    """Quality of a posterior, estimated from ``num_samples`` weighted draws.

    elbo, elbo_standard_error: nats. importance_bound: log mean weight, nats, never below the ELBO of the same draws.
    effective_sample_size: at most ``num_samples``. pareto_k: if it is above 0.7, the other figures are not reliable.
    """

    num_samples: int
    elbo: float
    elbo_standard_error: float
    importance_bound: float
    effective_sample_size: float
    pareto_k: float


class Posterior:
    """A fitted flow, together with the joint density to which it was fitted.

    Args:
        log_joint: see `LogJoint`.
        flow: a flow of this package or of zuko.
        losses: the negative ELBO in nats at every step of the fit, estimated from the samples of that step.
    """

    def __init__(self, log_joint: LogJoint, flow: Any, losses: list[float]) -> None:
        self.flow = flow
        self.losses = losses
        self._log_joint = log_joint

    @torch.no_grad()
    def sample(self, num: int, seed: int = 0) -> Float[Tensor, "S D"]:
        """Draw ``num`` samples from the flow."""
        return _draw(self.flow, num, torch.Generator().manual_seed(seed))[0]

    @torch.no_grad()
    def weighted(self, num: int, seed: int = 0) -> tuple[Float[Tensor, "S D"], Float[Tensor, " S"]]:
        """Draw samples and their normalised weights; weighted sums estimate expectations under the exact posterior.

        Raises:
            NumericsError: a weight is NaN or infinite, or all weights are 0.
        """
        x, log_weights = self._log_weights(num, seed)
        return x, torch.softmax(log_weights, dim=0)

    @torch.no_grad()
    def diagnostics(self, num: int = 10_000, seed: int = 0) -> ImportanceDiagnostics:
        """Estimate the quality of the fit from ``num`` draws.

        Raises:
            NumericsError: a weight is NaN or infinite, or all weights are 0.
        """
        _, log_weights = self._log_weights(num, seed)
        weights = torch.softmax(log_weights, dim=0)
        return ImportanceDiagnostics(
            num_samples=num,
            elbo=float(log_weights.mean()),
            elbo_standard_error=float(log_weights.std()) / math.sqrt(num),
            importance_bound=float(torch.logsumexp(log_weights, dim=0)) - math.log(num),
            effective_sample_size=1 / float(weights.square().sum()),
            pareto_k=_tail_shape(weights),
        )

    def _log_weights(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        x, log_q = _draw(self.flow, num, torch.Generator().manual_seed(seed))
        log_weights = (self._log_joint(x) - log_q).double()
        wrong = torch.isnan(log_weights) | (log_weights == math.inf)
        if bool(wrong.any()):
            raise NumericsError(f"{int(wrong.sum())} of {num} importance weights are NaN or infinite; check log_joint")
        if not bool(torch.isfinite(log_weights).any()):
            raise NumericsError(
                f"log_joint is minus infinity for all {num} draws; check log_joint, or fit with more steps"
            )
        return x, log_weights


def fit_posterior(
    log_joint: LogJoint,
    flow: Any,
    *,
    num_steps: int = 2000,
    num_samples: int = 128,
    peak_lr: float = 5e-3,
    gradient_clip_norm: float = 10.0,
    seed: int = 0,
    progress: bool = False,
) -> Posterior:
    """Fit ``flow`` to the posterior that ``log_joint`` defines; the flow is trained in place, by Adam.

    Args:
        log_joint: log p(x, data) ``(S,)`` of ``x (S, D)``, differentiable.
        flow: an unconditional flow on vectors, of this package or of zuko (``zuko.flows.NSF(3)``).
        num_steps: number of optimizer steps; the learning rate falls along a cosine to 1 % of ``peak_lr``.
        num_samples: number of samples drawn in each step.
        peak_lr: learning rate of the first step.
        gradient_clip_norm: gradients with a larger norm are scaled down to this norm.
        seed: seed of the draws; it does not affect the initial weights of the flow.
        progress: show a progress bar.

    Raises:
        NumericsError: the bound or its gradient was not finite in more than ten consecutive steps.
        ValueError: the result of ``log_joint`` does not have shape ``(S,)``.
    """
    parameters = list(flow.parameters())
    optimizer = torch.optim.Adam(parameters, lr=peak_lr)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    skipped = 0
    flow.train()
    with console.ProgressBar(num_steps, "fit", unit="steps", enabled=progress) as bar:
        for step in range(num_steps):
            rate = _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * rate
            x, log_q = _draw(flow, num_samples, generator)
            log_p = log_joint(x)
            if log_p.shape != log_q.shape:
                raise ValueError(
                    f"log_joint must return one number per sample, in shape {tuple(log_q.shape)} (got shape "
                    f"{tuple(log_p.shape)}); sum over all dimensions except the first"
                )
            loss = (log_q - log_p).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_norm)
            losses.append(float(loss.detach()))
            bar.update(1)
            if not (math.isfinite(losses[-1]) and bool(torch.isfinite(norm))):
                skipped += 1
                if skipped > _MOST_SKIPPED:
                    raise NumericsError(
                        f"the bound or its gradient was not finite in {skipped} consecutive steps (the last was step "
                        f"{step}); check log_joint for samples of the initial flow, or lower peak_lr"
                    )
                continue
            skipped = 0
            optimizer.step()
    return Posterior(log_joint, flow.eval(), losses)


def _draw(flow: Any, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw differentiable samples, and return them with their log densities."""
    with torch.random.fork_rng():  # zuko's distributions and the probes of a continuous flow use the global generator
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        if isinstance(flow, Flow):
            return flow.rsample_and_log_prob(num, generator=generator)
        return flow().rsample_and_log_prob((num,))


def _tail_shape(weights: Float[Tensor, " S"]) -> float:
    """Shape k of the tail of the weights, fitted to the excess of the largest weights over the next smaller weight."""
    num = len(weights)
    tail = min(math.ceil(_SMOOTHED_SHARE * num), math.ceil(3 * math.sqrt(num)))
    ordered = torch.sort(weights / weights.max()).values
    excess = ordered[num - tail :] - ordered[num - tail - 1]
    return pareto_shape(excess)


def pareto_shape(excess: Float[Tensor, " M"]) -> float:
    """Estimate the shape k of a generalised Pareto distribution from non-negative draws.

    This is the estimator of Zhang and Stephens (2009): a posterior mean, computed on a grid with the profile
    likelihood. The result is shrunk towards 0.5 as in Vehtari et al., arXiv 1507.02646, appendix C. It is infinite if
    the first quartile of the draws is 0, and NaN if there are fewer than 5 draws or no positive draw.
    """
    x = torch.sort(excess.double().cpu()).values
    num = len(x)
    quarter = x[max(0, int(num / 4 + 0.5) - 1)]
    if num < 5 or not bool(x[-1] > 0):
        return math.nan
    if not bool(quarter > 0):
        return math.inf
    size = 30 + int(math.sqrt(num))
    grid = torch.arange(1, size + 1, dtype=torch.float64)
    theta = 1 / x[-1] + (1 - torch.sqrt(size / (grid - 0.5))) / (3 * quarter)
    k = torch.log1p(-theta[:, None] * x).mean(dim=1)
    profile = num * (torch.log(-theta / k) - k - 1)
    mean = (torch.softmax(profile, dim=0) * theta).sum()
    shape = float(torch.log1p(-mean * x).mean())
    return (shape * num + 5) / (num + 10)
