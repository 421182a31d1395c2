"""RealNVP: its masks, and batch normalisation in training and in evaluation."""

import pytest
import torch

from tarflow_scale.config.model import RealNVPConfig
from tarflow_scale.flows.coupling import per_channel
from tarflow_scale.flows.realnvp import BatchNorm, MaskedCoupling, RealNVP
from tests.flows.catalogue import feature_maps, moved


def coupling(pattern: str, parity: int) -> MaskedCoupling:
    torch.manual_seed(0)
    made = MaskedCoupling(4, pattern, parity, 6, 1, bound=2.0).double()  # type: ignore[arg-type]
    for norm in (made.network.norm_out, *made.network.blocks[0].norms):  # type: ignore[union-attr]
        norm.initialized.fill_(True)  # type: ignore[union-attr, operator]
    moved(made, ())
    return made


@pytest.mark.parametrize("pattern", ["checkerboard", "channels"])
@pytest.mark.parametrize("parity", [0, 1])
def test_what_a_mask_shows_stays_and_decides_alone(pattern: str, parity: int) -> None:
    layer, x = coupling(pattern, parity), feature_maps(1, 4, 4, 4)
    mask = layer._mask(x).expand_as(x).bool()
    assert int(mask.sum()) == mask.numel() // 2
    if pattern == "checkerboard":
        assert bool(mask[0, 0, 0, 0]) == bool(mask[0, 0, 1, 1]) != bool(mask[0, 0, 0, 1])
    with torch.no_grad():
        y, log_det = layer(x)
        assert torch.equal(y[mask], x[mask])
        assert ((y - x)[~mask].abs() > 1e-9).all()
        other, other_log_det = layer(torch.where(mask, x, x + 1))
    assert torch.equal(log_det, other_log_det)  # what is hidden decides nothing
    assert ((other - y)[~mask] > 0).all()
    other_mask = coupling(pattern, 1 - parity)._mask(x).expand_as(x).bool()
    assert torch.equal(other_mask, ~mask)


def test_log_scales_are_bounded() -> None:
    layer, x = coupling("channels", 0), feature_maps(2, 4, 4, 4)
    with torch.no_grad():
        layer.network.conv_out.log_scale.fill_(3.0)
        log_det = layer(100 * x)[1]
    assert (log_det.abs() <= 2.0 * x[0].numel() / 2).all()
    assert torch.isfinite(log_det).all()


def test_batch_statistics_in_training_and_running_ones_afterwards() -> None:
    norm, x = BatchNorm(3).double(), 2 * feature_maps(16, 3) + 1
    norm.initialize(x)
    y, log_det = norm.eval()(x)
    assert y.mean(dim=(0, 2, 3)).abs().max() < 1e-12
    assert (y.var(dim=(0, 2, 3), unbiased=False) - 1).abs().max() < 1e-4  # but for the floor of the variance
    norm.train()
    kept = norm.running_mean.clone()
    other = 2 * x + 5
    z, _ = norm(other)
    expected = 0.9 * kept + 0.1 * other.mean(dim=(0, 2, 3))
    assert torch.allclose(norm.running_mean, expected)
    assert torch.allclose(z, (other - per_channel(expected, x)) / per_channel((norm.running_variance + 1e-5).sqrt(), x))
    before = norm.running_mean.clone()
    again, log_det_again = norm.eval()(x)
    assert torch.equal(norm.running_mean, before)  # evaluation changes nothing
    assert not torch.equal(again, y)
    assert not torch.equal(log_det_again, log_det)
    assert torch.allclose(norm.inverse(again), x)


def test_gradients_pass_through_the_statistics_of_the_batch() -> None:
    """Compared with finite differences of the whole training step, in which a sample changes the statistics of all."""
    norm = BatchNorm(2).double().train()
    weights = feature_maps(4, 2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        norm.running_mean.zero_()
        norm.running_variance.fill_(1.0)
        y, log_det = norm(x)
        return (weights * y.square()).sum() + log_det.sum()

    assert torch.autograd.gradcheck(loss, feature_maps(4, 2).flip(0).requires_grad_())


def test_images_that_cannot_be_squeezed_and_ways_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2\^\(model.levels - 1\).*\(got 8x6 and 4\)"):
        RealNVP((1, 8, 6), None, RealNVPConfig(levels=3))
    with pytest.raises(ValueError, match=r"\(got 4x4 and 4\)"):  # one pixel has no checkerboard
        RealNVP((1, 4, 4), None, RealNVPConfig(levels=3))
    flow = RealNVP((1, 4, 4), None, RealNVPConfig(levels=2, width=4, residual_blocks=1, normalization="batch"))
    with pytest.raises(ValueError, match=r"activations of RealNVP must be one of keep \(got checkpoint\)"):
        flow.activations = "checkpoint"
    assert flow.activations == "keep"


def test_surprise_of_a_pixel_is_that_of_what_its_couplings_see() -> None:
    """Four couplings have four 3x3 convolutions each; a level without a squeeze has a place for every pixel."""
    torch.manual_seed(0)
    flow = RealNVP((1, 1, 40), None, RealNVPConfig(levels=1, width=4, residual_blocks=1)).double()
    x = torch.randn(8, 1, 1, 40, dtype=torch.float64)
    flow.initialize(x)
    moved(flow, ("",))
    other = x.clone()
    other[:, :, :, 0] += 1
    changed = (flow.nats_of_values(x) != flow.nats_of_values(other)).flatten(0, 2).any(dim=0)
    assert changed[:9].all()
    assert not changed[17:].any()
