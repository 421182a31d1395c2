"""TarFlow: exact inverse, exact log-determinant, exact causality; and proof that the tests can fail."""

import pytest
import torch
from torch import Tensor

from tarflow_scale.flows import Flow, TarFlow
from tarflow_scale.flows.tarflow import TarFlowBlock, patchify, unpatchify

SHAPE = (2, 4, 6)


def randomised(num_classes: int | None = 3, layers: tuple[int, ...] = (1, 2)) -> TarFlow:
    """A small float64 flow whose weights are far from the zero start, at which every test would be vacuous."""
    torch.manual_seed(0)
    flow = TarFlow(SHAPE, num_classes, patch_size=2, width=16, layers_per_block=layers, head_width=8).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.add_((0.03 if "proj_out" in name else 0.3) * torch.randn_like(parameter))
    return flow


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *SHAPE, dtype=torch.float64, generator=generator)
    return x, torch.tensor([0, -1, 2, 1, 0])[:batch]


def check_log_det(flow: Flow, x: Tensor, y: Tensor | None) -> None:
    _, log_det = flow(x, y)
    assert log_det.shape == (len(x),)
    for i in range(len(x)):
        label = y[i : i + 1] if y is not None else None
        jacobian = torch.autograd.functional.jacobian(lambda v, label=label: flow(v[None], label)[0][0], x[i])
        expected = torch.linalg.slogdet(jacobian.reshape(flow.num_dims, flow.num_dims)).logabsdet
        assert abs(float((log_det[i] - expected).detach())) < 1e-8


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("layers", [(1,), (1, 2), (3, 1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_log_det_equals_autograds(num_classes: int | None, layers: tuple[int, ...], batch: int) -> None:
    x, y = inputs(batch)
    check_log_det(randomised(num_classes, layers), x, y if num_classes else None)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 2.0, 1 / 6])
def test_a_wrong_log_det_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TarFlowBlock.forward

    def wrong(self: TarFlowBlock, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        z, log_det = right(self, x, y)
        return z, factor * log_det

    monkeypatch.setattr(TarFlowBlock, "forward", wrong)
    x, y = inputs(2)
    with pytest.raises(AssertionError):
        check_log_det(randomised(), x, y)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_inverse_is_exact_both_ways(num_classes: int | None) -> None:
    flow = randomised(num_classes)
    x, y = inputs(5)
    labels = y if num_classes else None
    z, _ = flow(x, labels)
    assert (flow.inverse(z, labels) - x).abs().max() < 1e-10
    z = torch.randn(5, flow.num_dims, dtype=torch.float64)
    assert (flow(flow.inverse(z, labels), labels)[0] - z).abs().max() < 1e-10


def test_fp32_inverse_is_close() -> None:
    flow = randomised().float()
    x, y = inputs(5)
    z, _ = flow(x.float(), y)
    assert (flow.inverse(z, y) - x.float()).abs().max() / x.abs().max() < 1e-4


@pytest.mark.parametrize("flip", [False, True])
def test_a_token_depends_on_earlier_tokens_only(flip: bool) -> None:
    torch.manual_seed(0)
    block = TarFlowBlock(5, 4, 16, 2, 8, None, flip).double()
    with torch.no_grad():
        block.proj_out.weight.normal_()
    x = torch.randn(5, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: block(v[None], None)[0][0], x)  # (out, D, in, D)
    order = range(5)[::-1] if flip else range(5)
    for place, out in enumerate(order):
        for later in list(order)[place + 1 :]:
            assert (jacobian[out, :, later] == 0).all()
        for earlier in list(order)[:place]:
            assert (jacobian[out, :, earlier] != 0).any()
    first = order[0]
    assert (jacobian[first, :, first] == torch.eye(4, dtype=torch.float64)).all()


def test_a_fresh_flow_is_the_identity_on_patches() -> None:
    flow = TarFlow(SHAPE, None, patch_size=2, width=16, layers_per_block=(1, 1), head_width=8)
    x = inputs(2)[0].float()
    z, log_det = flow(x, None)
    assert (z == patchify(x, 2).flatten(1)).all()
    assert (log_det == 0).all()


def test_patches_are_row_major_with_channel_slowest_as_published() -> None:
    x = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    tokens = patchify(x, 2)
    unfolded = torch.nn.functional.unfold(x, kernel_size=2, stride=2).transpose(1, 2)  # what ml-tarflow does
    assert (tokens == unfolded).all()
    assert (unpatchify(tokens, 2, 4) == x).all()


def test_samples_do_not_see_each_other() -> None:
    flow = randomised()
    x, y = inputs(3)
    z, log_det = flow(x, y)
    other = torch.cat([x[:1], torch.randn_like(x[1:])])
    z_other, log_det_other = flow(other, y)
    assert (z[0] - z_other[0]).abs().max() < 1e-12
    assert abs(float((log_det[0] - log_det_other[0]).detach())) < 1e-12


def test_labels_condition_and_a_dropped_label_is_the_mean_embedding() -> None:
    flow = randomised()
    x, _ = inputs(1)
    by_label = [flow.log_prob(x, torch.tensor([label])).item() for label in (0, 1, 2, -1)]
    assert len(set(by_label)) == 4
    assert flow.log_prob(x, None).item() == pytest.approx(by_label[3], abs=1e-12)
    with torch.no_grad():
        for block in flow.blocks:
            block.class_embedding.copy_(block.class_embedding.mean(0, keepdim=True).expand(3, -1))
    assert flow.log_prob(x, torch.tensor([1])).item() == pytest.approx(by_label[3], abs=1e-12)


def reference_guided(flow: TarFlow, z: Tensor, y: Tensor, guidance: float) -> Tensor:
    """The published rule, written without a cache: every token from two full forward passes."""
    tokens = z.reshape(len(z), -1, flow.event_shape[0] * flow.patch_size**2)
    for block in reversed(list(flow.blocks)):
        x = block._order(tokens).clone()
        for t in range(x.shape[1] - 1):
            both = []
            for labels in (y, None):
                h = block.proj_in(x) + block._order(block.position[None]) + block._condition(labels)
                for layer in block.layers:
                    h = layer(h)
                both.append(block.proj_out(h)[:, t].chunk(2, dim=-1))
            (scale, mean), (scale_dropped, mean_dropped) = both
            scale = scale + guidance * (scale - scale_dropped)
            mean = mean + guidance * (mean - mean_dropped)
            x[:, t + 1] = x[:, t + 1] * scale.exp() + mean
        tokens = block._order(x)
    return unpatchify(tokens, flow.patch_size, flow.event_shape[1])


@torch.no_grad()
def test_guided_decoding_follows_the_published_rule() -> None:
    flow = randomised()
    with torch.no_grad():
        for block in flow.blocks:
            block.proj_out.weight.mul_(0.5)
    z = torch.randn(3, flow.num_dims, dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    assert (flow.inverse(z, y, guidance=1.5) - reference_guided(flow, z, y, 1.5)).abs().max() < 1e-9
    assert (flow.inverse(z, y, guidance=1.5) - flow.inverse(z, y)).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient() -> None:
    flow = randomised().train()
    x, _ = inputs(5)
    flow.log_prob(x, torch.tensor([0, 1, 2, -1, 0])).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_bf16_autocast_keeps_the_affine_map_wide() -> None:
    flow = randomised().float()
    x, y = inputs(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = flow(x.float(), y)
    assert z.dtype == log_det.dtype == torch.float32
    exact, exact_log_det = flow(x.float(), y)
    assert torch.isfinite(z).all()
    assert (log_det - exact_log_det).abs().max() < 0.2
    assert (z - exact).abs().mean() < 0.1


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of model.patch_size \(got 8x8 and 3\)"):
        TarFlow((1, 8, 8), None, patch_size=3, width=8, layers_per_block=(1,), head_width=8)
    unconditional = randomised(None)
    with pytest.raises(ValueError, match="guidance needs a class-conditional flow"):
        unconditional.inverse(torch.zeros(1, unconditional.num_dims).double(), guidance=1.0)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    flow = randomised()
    x, y = inputs(5)
    z, log_det = flow(x, y)
    z_cuda, log_det_cuda = flow.cuda()(x.cuda(), y.cuda())
    assert (z - z_cuda.cpu()).abs().max() < 1e-9
    assert (log_det - log_det_cuda.cpu()).abs().max() < 1e-9
    assert (flow.inverse(z_cuda, y.cuda()).cpu() - x).abs().max() < 1e-9
