"""Every layer of the catalogue, and properties of each layer: closed forms, hand-written tables, statistics."""

import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from tarflow_scale.flows.coupling import ActNorm, Coupling, CouplingNetwork, InvertibleConv, squeeze, unsqueeze
from tarflow_scale.flows.recompute import rebuild_run
from tests.flows import conformance
from tests.flows.catalogue import LAYERS, LayerCase, feature_maps, moved

every_layer = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


@every_layer
@given(channels=st.integers(2, 7), batch=st.sampled_from([1, 3]), height=st.integers(1, 3), width=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_log_determinant_and_inverse(case: LayerCase, channels: int, batch: int, height: int, width: int) -> None:
    layer, x = case.layer(channels), feature_maps(batch, channels, height, width)
    conformance.check_layer_log_det(layer, x)
    conformance.check_layer_inverse(layer, x)


@every_layer
def test_the_inverse_is_close_in_fp32(case: LayerCase) -> None:
    layer, x = case.layer(6).float(), feature_maps(4, 6).float()
    with torch.no_grad():
        assert (layer.inverse(layer(x)[0]) - x).abs().max() / x.abs().max() < 1e-4


@every_layer
def test_samples_do_not_see_each_other(case: LayerCase) -> None:
    layer, x = case.layer(4), feature_maps(3, 4)
    with torch.no_grad():
        y, log_det = layer(x)
        alone, log_det_alone = layer(x[1:2])
    assert (y[1] - alone[0]).abs().max() < 1e-12
    assert abs(float(log_det[1] - log_det_alone[0])) < 1e-12


@every_layer
def test_rebuilding_gives_the_input_back_with_a_graph(case: LayerCase) -> None:
    layer, x = case.layer(5), feature_maps(2, 5)
    with torch.no_grad():
        y, log_det = layer(x)
    leaves, again, log_det_again = rebuild_run((layer,), y)
    assert (torch.cat([leaf.detach() for leaf in leaves], dim=1) - x).abs().max() < 1e-10
    assert (again - y).abs().max() < 1e-10
    assert (log_det_again - log_det).abs().max() < 1e-10
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
    (again.sum() + log_det_again.sum()).backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_squeeze_follows_the_table() -> None:
    x = torch.arange(16).reshape(1, 1, 4, 4)
    expected = [[[0, 2], [8, 10]], [[1, 3], [9, 11]], [[4, 6], [12, 14]], [[5, 7], [13, 15]]]
    assert squeeze(x.float())[0].tolist() == expected


def test_squeeze_keeps_channels_slowest() -> None:
    x = torch.arange(2 * 2 * 2).reshape(1, 2, 2, 2).float()
    assert squeeze(x).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@given(channels=st.integers(1, 5), height=st.integers(1, 4), width=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_unsqueeze_undoes_squeeze_to_the_bit(channels: int, height: int, width: int) -> None:
    x = torch.randn(2, channels, 2 * height, 2 * width)
    assert squeeze(x).shape == (2, 4 * channels, height, width)
    assert torch.equal(unsqueeze(squeeze(x)), x)


# -- ActNorm ----------------------------------------------------------------------------------------------------------


def test_actnorm_normalises_the_batch_it_is_set_from() -> None:
    norm, x = ActNorm(3).double(), 5 + 3 * feature_maps(50, 3)
    norm.initialize(x)
    y, _ = norm(x)
    assert y.mean(dim=(0, 2, 3)).abs().max() < 1e-6
    assert (y.var(dim=(0, 2, 3), correction=0).sqrt() - 1).abs().max() < 1e-5


def test_actnorm_is_set_once_and_says_so_in_its_state(tmp_path: Path) -> None:
    norm, x = ActNorm(3), feature_maps(8, 3).float()
    for use in (norm, norm.train(), norm.eval(), norm.inverse):
        with pytest.raises(RuntimeError, match="never initialised"):
            use(x)
    norm.initialize(x)
    kept = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.train()(10 * x)
    assert all(torch.equal(kept[name], value) for name, value in norm.state_dict().items())
    save_file(norm.state_dict(), tmp_path / "norm.safetensors")
    loaded = ActNorm(3)
    loaded.load_state_dict(load_file(tmp_path / "norm.safetensors"))
    assert torch.equal(loaded(x)[0], norm(x)[0])
    loaded.load_state_dict(ActNorm(3).state_dict())
    with pytest.raises(RuntimeError, match="never initialised"):
        loaded(x)


def test_actnorm_of_a_constant_channel_is_finite() -> None:
    norm = ActNorm(2)
    norm.initialize(torch.ones(4, 2, 3, 3))
    y, log_det = norm(torch.ones(4, 2, 3, 3))
    assert torch.isfinite(y).all()
    assert torch.isfinite(log_det).all()
    assert y.abs().max() < 1e-6


# -- 1x1 convolution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "lu"])
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_a_fresh_convolution_is_a_rotation(kind: str, channels: int) -> None:
    conv = InvertibleConv(channels, kind).double()  # type: ignore[arg-type]
    weight = conv.matrix()
    assert (weight @ weight.mT - torch.eye(channels)).abs().max() < 1e-5  # it was made in fp32
    assert conv(feature_maps(2, channels))[1].abs().max() < 1e-5


def test_lu_is_its_factors_and_equals_dense() -> None:
    lu = InvertibleConv(6, "lu").double()
    moved(lu, ())
    lower = lu.lower.tril(-1) + torch.eye(6)
    upper = lu.upper.triu(1) + torch.diag(lu.sign * lu.log_diagonal.exp())
    assert (lu.matrix() - lu.permutation @ lower @ upper).abs().max() < 1e-12
    x = feature_maps(3, 6)
    y, log_det = lu(x)
    assert (log_det - 6 * lu.log_diagonal.sum()).abs().max() < 1e-12  # 2x3 pixels
    dense = InvertibleConv(6, "dense").double()
    with torch.no_grad():
        dense.weight.copy_(lu.matrix())
    assert (dense(x)[0] - y).abs().max() < 1e-10
    assert (dense(x)[1] - log_det).abs().max() < 1e-10
    assert (dense.inverse(x) - lu.inverse(x)).abs().max() < 1e-10


# -- coupling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "changed"), [(4, 2), (5, 3)])
def test_a_fresh_affine_coupling_scales_by_sigmoid_2(channels: int, changed: int) -> None:
    coupling, x = Coupling(channels, 8, "affine").double(), feature_maps(2, channels)
    initialise(coupling.network, x[:, : channels // 2])
    y, log_det = coupling(x)
    assert torch.equal(y[:, : channels // 2], x[:, : channels // 2])
    assert (log_det + 0.126928011 * changed * 6).abs().max() < 1e-6


@pytest.mark.parametrize(("bound", "low", "high"), [(None, 0, 1), (3.0, 0.2689, 0.9934)])
def test_a_bounded_scale_cannot_vanish(bound: float | None, low: float, high: float) -> None:
    coupling, x = Coupling(4, 8, "affine", bound).double(), feature_maps(2, 4)
    initialise(coupling.network, x[:, :2])
    for raw, limit in ((-1e3, low), (1e3, high)):
        with torch.no_grad():
            coupling.network.conv_out.conv.bias[2:] = raw  # type: ignore[index]
        scale = float((coupling(x)[1] / 12).exp()[0].detach())
        assert scale == pytest.approx(limit, abs=1e-4)


def test_a_fresh_additive_coupling_is_the_identity() -> None:
    coupling, x = Coupling(4, 8, "additive").double(), feature_maps(2, 4)
    initialise(coupling.network, x[:, :2])
    y, log_det = coupling(x)
    assert torch.equal(y, x)
    assert (log_det == 0).all()


def initialise(network: CouplingNetwork, h: torch.Tensor) -> None:
    network.norm_in.initialize(network.conv_in(h))
    network.norm_mid.initialize(network.conv_mid(torch.relu(network.norm_in(network.conv_in(h))[0])))


def test_one_channel_cannot_be_coupled() -> None:
    with pytest.raises(ValueError, match=r"at least 2 channels \(got 1\)"):
        Coupling(1, 8, "affine")


def test_the_sign_of_a_scale_does_not_change_a_determinant() -> None:
    conv = InvertibleConv(3, "dense").double()
    with torch.no_grad():
        conv.weight[0] *= -2
    assert (conv(feature_maps(1, 3))[1] - 6 * math.log(2)).abs().max() < 1e-5
