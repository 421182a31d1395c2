"""The bound of a flow on latents: closed forms of a linear Gaussian model, and the total probability of all images."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tarflow_scale.autoencoders.contract import Autoencoder, LatentGaussian, from_stored
from tarflow_scale.autoencoders.pixels_given_latent import log_density
from tarflow_scale.autoencoders.rendering import Renderer
from tarflow_scale.autoencoders.stored import build_autoencoder
from tarflow_scale.config.autoencoder import AutoencoderConfig, ConvolutionalConfig, TinyConfig
from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.protocols import BoundProtocol
from tarflow_scale.flows import Flow
from tarflow_scale.flows.build import build
from tarflow_scale.flows.conditions import Condition
from tarflow_scale.flows.likelihood import combine_draws
from tarflow_scale.metrics.bound import bits_per_dim_bound, log_weights
from tarflow_scale.records import LatentFacts, PixelFormat
from tarflow_scale.shards.reader import Batch

LATENT, IMAGE = (2, 2, 1), (1, 4, 2)
NUM_LATENTS, NUM_PIXELS = math.prod(LATENT), math.prod(IMAGE)
NOISE_STD, PIXEL_STD = 0.1, 0.3
FACTS = LatentFacts(
    autoencoder="0" * 64, shape=LATENT, image_shape=IMAGE, bit_depth=8, has_variance=True, dtype="float32",
    mean=(0.7, -1.3), scale=(0.4, 2.5),
)  # fmt: skip


def protocol(num_draws: int, estimate: str = "mean", seed: int = 0, bit_depth: int = 8) -> BoundProtocol:
    facts = {"name": "a_bound", "metric": "bits_per_dim_bound", "bit_depth": bit_depth, "labels": "none"}
    return BoundProtocol.model_validate(facts | {"num_draws": num_draws, "estimate": estimate, "seed": seed})


def batch_of(images: np.ndarray, samples: np.ndarray | None = None) -> Batch:
    numbers = np.arange(len(images)) if samples is None else samples
    return Batch(images, np.full(len(images), -1), numbers, np.zeros(len(images), dtype=np.int64))


def prepared(flow: Flow, autoencoder: Autoencoder, facts: LatentFacts, noise_std: float) -> Flow:
    """A flow as `load` gives it."""
    flow.latents, flow.pixels = facts, PixelFormat(bit_depth=8, noise="gaussian", noise_std=noise_std)
    flow.renderer = Renderer(autoencoder.eval(), facts)
    return flow.eval()


class GaussianFlow(Flow):
    """v = shift + factor z, with a lower triangular factor."""

    def __init__(self, shift: Tensor, factor: Tensor) -> None:
        super().__init__(LATENT, None, None)
        self.shift, self.factor = nn.Parameter(shift), nn.Parameter(factor)

    def encode(self, x: Tensor, y: Condition) -> tuple[Tensor, Tensor]:
        centred = (x.flatten(1) - self.shift).T
        z = torch.linalg.solve_triangular(self.factor, centred, upper=False).T
        return z, -self.factor.diagonal().abs().log().sum().expand(len(x))

    def decode(self, z: Tensor, y: Condition, guidance: object) -> Tensor:
        return (self.shift + z @ self.factor.T).view(-1, *LATENT)


class LinearAutoencoder(Autoencoder):
    """x = weight v + bias + noise at standardised latents v; q is its posterior, or a Gaussian near it.

    The density of pixels stands in for the probability of levels, because the closed form is a density.
    """

    factor, num_channels, latent_channels = 2, 1, 2

    def __init__(self, shift: Tensor, covariance: Tensor, off_mean: float, off_std: float) -> None:
        super().__init__()
        # The weight is chosen so that the exact posterior has a diagonal covariance, although the flow has not.
        generator = torch.Generator().manual_seed(1)
        precision = torch.linalg.inv(covariance)
        self.precision = 2 * torch.linalg.eigvalsh(precision).max() + torch.arange(NUM_LATENTS).double()
        square = PIXEL_STD**2 * (torch.diag(self.precision) - precision)
        values, vectors = torch.linalg.eigh(square)
        columns = torch.linalg.qr(torch.randn(NUM_PIXELS, NUM_LATENTS, dtype=torch.float64, generator=generator)).Q
        self.weight = nn.Parameter(columns @ (vectors * values.sqrt()) @ vectors.T)
        self.bias = torch.randn(NUM_PIXELS, dtype=torch.float64, generator=generator) / 5
        self.prior = precision @ shift
        self.off_mean, self.off_std = off_mean, off_std
        mean, scale = (torch.tensor(values, dtype=torch.float64) for values in (FACTS.mean, FACTS.scale))
        self.mean, self.scale = (values.repeat_interleave(NUM_LATENTS // 2) for values in (mean, scale))

    def encode(self, x: Tensor) -> LatentGaussian:
        seen = (x.flatten(1) - self.bias) @ self.weight / PIXEL_STD**2
        std = self.off_std / self.precision.sqrt()
        mean = (seen + self.prior) / self.precision + self.off_mean * std
        std = (std**2 - NOISE_STD**2).sqrt()  # the noise of the flow's training is added to the latents
        moments = self.mean + self.scale * mean, 2 * (self.scale * std).log().expand_as(mean)
        return LatentGaussian(*(values.reshape(-1, *LATENT) for values in moments))

    def decode(self, z: Tensor) -> Tensor:
        return (((z.flatten(1) - self.mean) / self.scale) @ self.weight.T + self.bias).view(-1, *IMAGE)

    def log_prob_of_levels(self, levels: Tensor, bit_depth: int, z: Tensor) -> Tensor:
        assert bit_depth == 8
        log_scale = torch.full((1,), math.log(PIXEL_STD), dtype=torch.float64)
        return log_density("gaussian", from_stored(levels).double(), self.decode(z), log_scale)


def factor_analysis(off_mean: float = 0.0, off_std: float = 1.0) -> tuple[Flow, Batch, Tensor]:
    """A linear Gaussian model, images, and their exact log densities; q is off the posterior in units of its std."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(NUM_LATENTS, dtype=torch.float64, generator=generator) / 3
    factor = torch.randn(NUM_LATENTS, NUM_LATENTS, dtype=torch.float64, generator=generator).tril(-1) / 2
    factor += torch.diag(torch.linspace(0.5, 1.2, NUM_LATENTS, dtype=torch.float64))
    autoencoder = LinearAutoencoder(shift, factor @ factor.T, off_mean, off_std)
    flow = prepared(GaussianFlow(shift, factor), autoencoder, FACTS, NOISE_STD)
    images = np.random.default_rng(2).integers(0, 256, (24, *IMAGE), dtype=np.uint8)
    with torch.no_grad():
        mean = autoencoder.weight @ shift + autoencoder.bias
        covariance = autoencoder.weight @ factor @ factor.T @ autoencoder.weight.T
        covariance += PIXEL_STD**2 * torch.eye(NUM_PIXELS, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(mean, covariance)
        exact = normal.log_prob(from_stored(torch.from_numpy(images)).double().flatten(1))
    return flow, batch_of(images), exact


def test_with_the_exact_posterior_every_draw_is_the_likelihood_of_factor_analysis() -> None:
    flow, batch, exact = factor_analysis()
    weights = log_weights(flow, batch, None, protocol(5))
    assert weights.dtype == torch.float64
    assert torch.allclose(weights, exact.expand_as(weights), rtol=0, atol=1e-9)
    bits = bits_per_dim_bound(flow, batch, None, protocol(2))
    assert torch.allclose(bits, -exact / (NUM_PIXELS * math.log(2)), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("off_mean", "off_std"), [(0.5, 1.0), (0.0, 1.5), (-0.3, 0.8)])
def test_a_worse_posterior_loses_its_divergence(off_mean: float, off_std: float) -> None:
    flow, batch, exact = factor_analysis(off_mean, off_std)
    lost = exact - log_weights(flow, batch, None, protocol(500))
    variance = off_std**2
    kl = 0.5 * NUM_LATENTS * (variance + variance * off_mean**2 - 1 - math.log(variance))
    error = float(lost.std()) / math.sqrt(lost.numel())
    assert abs(float(lost.mean()) - kl) < 5 * error < kl / 2


def test_importance_weights_tighten_the_bound_towards_the_likelihood() -> None:
    flow, batch, exact = factor_analysis(off_mean=0.4, off_std=1.6)
    weights = log_weights(flow, batch, None, protocol(1024))
    gaps: list[float] = []
    for num in (1, 4, 16, 64):
        combined = combine_draws(weights.unflatten(0, (num, -1)).flatten(1), "importance").view(-1, len(exact))
        gaps.append(float((exact - combined).mean()))
    assert gaps[0] > 1.5
    assert all(looser > 2 * tighter for looser, tighter in itertools.pairwise(gaps))
    assert abs(gaps[3]) < 0.05
    one, many = (bits_per_dim_bound(flow, batch, None, protocol(8, kind)).mean() for kind in ("mean", "importance"))
    assert float(one - many) > 0.02


def random_flow(model: Flow) -> Flow:
    """Weights away from the identity with which a flow starts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


@pytest.mark.parametrize(("likelihood", "posterior"), [("logistic", "learned"), ("gaussian", "fixed")])
def test_the_weights_of_all_images_add_up_to_one(likelihood: str, posterior: str) -> None:
    """The mean of the weights estimates p(x) without bias, so its sum over every image of one bit is near 1."""
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "factor": 2, "latent_channels": 2, "width": 8, "blocks": 1, "likelihood": likelihood}
    of_posterior = {"posterior": posterior} | ({"posterior_std": 1.0} if posterior == "fixed" else {})
    config = ConvolutionalConfig.model_validate(sizes | of_posterior)
    autoencoder = build_autoencoder(config)
    nn.init.constant_(autoencoder.get_parameter("log_scale"), math.log(0.4))
    facts = FACTS.model_copy(update={"mean": (0.1, -0.2), "scale": (0.5, 0.8)})
    sections = {"kind": "tarflow", "patch_size": 1, "width": 16, "head_width": 8, "layers_per_block": [1, 1]}
    model = build(TarFlowConfig.model_validate(sections | {"class_conditional": False}), LATENT)
    flow = prepared(random_flow(model), autoencoder, facts, 0.3)
    images = np.array(list(itertools.product((0, 128), repeat=NUM_PIXELS)), dtype=np.uint8).reshape(-1, *IMAGE)
    totals = log_weights(flow, batch_of(images), None, protocol(100, bit_depth=1)).exp().sum(dim=1)
    error = float(totals.std()) / math.sqrt(len(totals))
    assert error < 0.04
    assert float(totals.mean()) == pytest.approx(1, abs=4 * error)


def test_a_draw_depends_on_seed_sample_and_its_number_alone() -> None:
    flow, batch, _ = factor_analysis(0.5, 1.3)
    whole = log_weights(flow, batch, None, protocol(3))
    assert torch.allclose(log_weights(flow, batch[2:4], None, protocol(3)), whole[:, 2:4], rtol=1e-12)
    order = np.array([4, 0, 5])
    shuffled = batch_of(batch.events[order], batch.samples[order])
    assert torch.allclose(log_weights(flow, shuffled, None, protocol(3)), whole[:, order], rtol=1e-12)
    assert torch.equal(log_weights(flow, batch, None, protocol(2)), whole[:2])
    other = log_weights(flow, batch, None, protocol(3, seed=1))
    assert not torch.isclose(other, whole).any()
    assert not torch.isclose(whole[0], whole[1]).any()


def lacks_a_variance(renderer: Renderer, images: Tensor) -> None:
    renderer.posterior(images, 0.1)


def lacks_bins(renderer: Renderer, images: Tensor) -> None:
    renderer.log_prob_of_levels(images, 8, torch.zeros(len(images), *LATENT))


@pytest.mark.parametrize(
    ("config", "call", "reason"),
    [
        (TinyConfig(width=4, latent_channels=2), lacks_a_variance, "has no density of latents"),
        (TinyConfig(width=4, latent_channels=2), lacks_bins, "a distribution of bins, logistic or gaussian"),
        (ConvolutionalConfig(factor=2, latent_channels=2, likelihood="laplace"), lacks_bins, "a distribution of bins"),
    ],
)
def test_autoencoders_without_a_bound_say_so(
    config: AutoencoderConfig, call: Callable[[Renderer, Tensor], None], reason: str
) -> None:
    renderer = Renderer(build_autoencoder(config), FACTS)
    with pytest.raises(ValueError, match=reason):
        call(renderer, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
