"""The objective of autoencoders, against formulas written a second time in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tarflow_scale.autoencoders.contract import Autoencoder
from tarflow_scale.autoencoders.stored import build_autoencoder
from tarflow_scale.config.autoencoder import ConvolutionalConfig, TinyConfig
from tarflow_scale.shards.reader import Batch
from tarflow_scale.training.noise import sample_noise
from tarflow_scale.training.reconstruction import ReconstructionObjective
from tests.flows.catalogue import moved

CPU = torch.device("cpu")
SHAPE = (3, 16, 8)
PIXELS = {"logistic": stats.logistic, "gaussian": stats.norm, "laplace": stats.laplace}
POSTERIORS = {
    "learned": {"kl_weight": 0.25},
    "bound": {},
    "fixed": {"posterior": "fixed", "posterior_std": 0.5},
    "fixed, near 0": {"posterior": "fixed", "posterior_std": 0.5, "kl_weight": 2.0},
}


def config(**more: object) -> ConvolutionalConfig:
    sizes = {"factor": 4, "latent_channels": 2, "width": 8, "blocks": 1}
    return ConvolutionalConfig.model_validate(sizes | more)


def batch_of(num: int) -> Batch:
    images = np.random.default_rng(0).integers(0, 256, (num, *SHAPE), dtype=np.uint8)
    images[0] = np.where(images[0] < 128, 0, 255)  # the outermost levels
    numbers = np.arange(num, dtype=np.int64)
    return Batch(images, np.full(num, -1), numbers + 7, numbers // 2)


def objective_of(autoencoder: Autoencoder, kl_weight: float | None, noise_std: float = 0.0) -> ReconstructionObjective:
    torch.manual_seed(0)
    moved(autoencoder, ("",))
    return ReconstructionObjective(autoencoder, SHAPE, 8, kl_weight, noise_std).double()


def figures_of(objective: ReconstructionObjective, batch: Batch) -> np.ndarray:
    images, noise = objective.inputs(batch, 5, CPU, training=True)
    assert noise is not None
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the networks compute in float64
        return objective(images, noise.double()).numpy()


def expected_of(objective: ReconstructionObjective, batch: Batch, settings: ConvolutionalConfig) -> np.ndarray:
    """Loss, reconstruction, KL and PSNR from their definitions: bins by differences of SciPy's distributions."""
    autoencoder = objective.model
    x = torch.from_numpy(batch.events).double() / 127.5 - 1
    where = batch.epochs, batch.samples
    noise = sample_noise("gaussian", 5, *where, 2 * 4 * 2, CPU, purpose=6).view(-1, 2, 4, 2).double()
    with torch.no_grad():
        mean, log_var = autoencoder.encode(x)
        assert log_var is not None
        std = (0.5 * log_var).exp()
        decoded = autoencoder.decode(mean + std * noise).numpy()
        scale = autoencoder.get_parameter("log_scale").exp().numpy()[:, None, None]
    mean, std = mean.numpy(), std.numpy()
    pixel = PIXELS[settings.likelihood](decoded, scale)
    levels = batch.events.astype(np.float64)
    if settings.likelihood == "laplace":
        log_prob = pixel.logpdf(x.numpy())
    else:
        low, high = 2 * levels / 256 - 1, 2 * (levels + 1) / 256 - 1
        low, high = np.where(levels == 0, -np.inf, low), np.where(levels == 255, np.inf, high)
        above = low > decoded  # there, 1 - cdf has the digits
        log_prob = np.log(np.where(above, pixel.sf(low) - pixel.sf(high), pixel.cdf(high) - pixel.cdf(low)))
    reconstruction = -log_prob.sum(axis=(1, 2, 3))
    kl = (0.5 * (mean**2 + std**2) - 0.5 - np.log(std)).sum(axis=(1, 2, 3))
    error = ((np.clip(decoded, -1, 1) - x.numpy()) ** 2).mean(axis=(1, 2, 3))
    return np.stack([reconstruction + settings.weight_of_kl * kl, reconstruction, kl, 10 * np.log10(4 / error)], axis=1)


@pytest.mark.parametrize("likelihood", PIXELS)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_figures_are_those_of_the_definitions(likelihood: str, posterior: str) -> None:
    settings = config(likelihood=likelihood, **POSTERIORS[posterior])
    objective = objective_of(build_autoencoder(settings), settings.weight_of_kl)
    batch = batch_of(4)
    figures, expected = figures_of(objective, batch), expected_of(objective, batch, settings)
    assert np.allclose(figures, expected, rtol=1e-9, atol=1e-7)
    means = (float(figures[:, 0].mean()) / math.prod(SHAPE), *figures[:, 1:].mean(axis=0).tolist())
    record = objective.record(means)
    assert record["nats_per_dim"] == means[0]
    bound = (expected[:, 1] + expected[:, 2]).mean() / (math.prod(SHAPE) * math.log(2))
    assert record["bits_per_dim"] == (None if likelihood == "laplace" else pytest.approx(bound))
    assert record["psnr_db"] == pytest.approx(expected[:, 3].mean())
    if posterior == "bound" and likelihood != "laplace":
        assert record["bits_per_dim"] == pytest.approx(means[0] / math.log(2))
    assert objective.record(None) == dict.fromkeys(record)


def test_weights_of_the_kl_divergence() -> None:
    assert config().weight_of_kl == 1
    assert config(posterior="fixed").weight_of_kl == 0
    assert config(posterior="fixed", kl_weight=0.1).weight_of_kl == 0.1


def test_inputs_depend_on_seed_epoch_and_sample_alone() -> None:
    objective, batch = objective_of(build_autoencoder(config()), 1.0), batch_of(6)
    images, noise = objective.inputs(batch, 5, CPU, training=True)
    part = objective.inputs(batch[2:5], 5, CPU, training=False)
    assert images is not None
    assert noise is not None
    assert images.dtype == torch.uint8
    assert part[1] is not None
    assert torch.equal(part[1], noise[2:5])
    assert not torch.equal(objective.inputs(batch, 6, CPU, training=True)[1], noise)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["autoencoder", "tiny"])
def test_only_the_decoder_is_trained_on_latents_with_noise(kind: str) -> None:
    """The noise has the standard deviation of a channel times a factor, so it widens the Gaussian of the encoder."""
    settings = config() if kind == "autoencoder" else TinyConfig(latent_channels=2, width=8)
    shape = (3, 16, 8)
    objective = objective_of(build_autoencoder(settings), None, noise_std=0.3).float()
    batch = batch_of(12)
    objective.initialize(batch, 5, 0, CPU)
    images, noise = objective.inputs(batch, 5, CPU, training=True)
    assert images is not None
    assert noise is not None
    with torch.no_grad():
        mean, log_var = objective.model.encode(images.float() / 127.5 - 1)
    variance = torch.zeros_like(mean) if log_var is None else log_var.exp()
    scale = (mean.square() + variance).mean(dim=(0, 2, 3)) - mean.mean(dim=(0, 2, 3)).square()
    assert torch.allclose(objective.latent_scale, scale.sqrt(), rtol=1e-4)
    latent = objective.posterior(images)
    assert latent.log_var is not None
    assert torch.allclose(latent.log_var.exp(), variance + 0.09 * scale[:, None, None], rtol=1e-4)
    assert torch.allclose(latent.mean, mean)

    loss = objective(images, noise)[:, 0]
    decoded = objective.model.decode(latent.at(noise))
    assert objective.num_dims == math.prod(shape)
    if kind == "tiny":  # a published autoencoder has no pixel distribution: L1 with a learned scale
        assert objective.log_scale is not None
        log_scale = objective.log_scale[:, None, None]
        l1 = ((images.float() / 127.5 - 1 - decoded).abs() / log_scale.exp() + log_scale + math.log(2)).sum((1, 2, 3))
        assert torch.allclose(loss, l1, rtol=1e-4)
    loss.mean().backward()
    parts = objective.model.encoder_parts
    grads = {name: weight.grad for name, weight in objective.model.named_parameters()}
    assert all((grads[name] is None) == name.startswith(parts) for name in grads)
    assert any(name.startswith(parts) for name in grads)


def test_a_constant_channel_has_noise_that_is_not_zero() -> None:
    autoencoder = build_autoencoder(TinyConfig(latent_channels=2, width=8))
    objective = ReconstructionObjective(autoencoder, SHAPE, 8, None, 0.3)
    with torch.no_grad():
        for weight in autoencoder.get_submodule("encoder").parameters():
            weight.zero_()
    batch = batch_of(2)
    objective.initialize(batch, 2, 0, CPU)
    images, noise = objective.inputs(batch, 0, CPU, training=True)
    assert bool(torch.isfinite(objective(images, noise)).all())
