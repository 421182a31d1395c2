"""A flow as a posterior: fit it to a log joint density, ask how far it can be believed, draw from it.

    pip install -e '.[flows]'
    python launch/examples/posterior.py        # about twenty seconds of two quiet cores, without output meanwhile

The log joint density may be that of any model that torch can evaluate and differentiate; here it is a banana in two
dimensions. The flow may be ours or zuko's. The mathematics is in `tarflow_scale.density.variational`.
"""

# %% The log joint density
import torch

from tarflow_scale.config.model import IAFConfig
from tarflow_scale.density import fit_posterior
from tarflow_scale.flows import build


def log_joint(x: torch.Tensor) -> torch.Tensor:
    """Log p(x, data) in nats ``(S,)`` of ``x (S, 2)``."""
    first = torch.distributions.Normal(0.0, 1.5).log_prob(x[:, 0])
    return first + torch.distributions.Normal(0.5 * x[:, 0] ** 2, 0.5).log_prob(x[:, 1])


# %% Fit, check, draw
posterior = fit_posterior(log_joint, build(IAFConfig(class_conditional=False), (2,)), num_steps=500)
print(posterior.diagnostics())  # ELBO, importance-weighted bound, effective sample size, Pareto k
draws = posterior.sample(1000)  # (1000, 2)
print(f"mean {draws.mean(dim=0).tolist()}, standard deviation {draws.std(dim=0).tolist()}")
