"""Properties of TarFlow: order of features, causality, guidance, bounds. test_conformance tests the contract."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows import TarFlow
from tarflow_scale.flows.tarflow import TarFlowBlock, patchify, unpatchify
from tests.flows import conformance
from tests.flows.catalogue import moved

SHAPE = (2, 4, 6)


def randomised(num_classes: int | None = 3, layers: tuple[int, ...] = (1, 2), **options: object) -> TarFlow:
    torch.manual_seed(0)
    settings = {"patch_size": 2, "width": 16, "head_width": 8, "layers_per_block": layers} | options
    flow = TarFlow(SHAPE, num_classes, TarFlowConfig(**settings)).double().eval()  # type: ignore[arg-type]
    moved(flow, ("proj_out",))
    return flow


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, -1, 2, 1, 0])[:batch]


@given(
    channels=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch=st.integers(1, 2),
    blocks=st.lists(st.integers(1, 2), min_size=1, max_size=3),
    classes=st.sampled_from([None, 1, 3]),
)
@settings(max_examples=12, deadline=None)
def test_any_shape_keeps_the_contract(
    channels: int, rows: int, columns: int, patch: int, blocks: list[int], classes: int | None
) -> None:
    shape = (channels, rows * patch, columns * patch)
    config = TarFlowConfig(patch_size=patch, width=8, head_width=4, layers_per_block=tuple(blocks))
    flow = TarFlow(shape, classes, config).double()
    moved(flow, ("proj_out",))
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = None if classes is None else torch.tensor([0, -1])
    conformance.check_flow_log_det(flow, x, y)
    conformance.check_flow_inverse(flow, x, y)


@pytest.mark.parametrize("flip", [False, True])
def test_a_token_depends_on_earlier_tokens_only(flip: bool) -> None:
    torch.manual_seed(0)
    config = TarFlowConfig(patch_size=2, width=16, head_width=8, layers_per_block=(2,))
    block = TarFlowBlock((1, 5), 4, 2, None, flip, config).double()
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


@pytest.mark.parametrize("variant", ["affine", "volume_preserving"])
def test_a_fresh_flow_is_the_identity_on_patches(variant: str) -> None:
    config = TarFlowConfig(patch_size=2, width=16, layers_per_block=(1, 1), head_width=8, variant=variant)  # type: ignore[arg-type]
    flow = TarFlow(SHAPE, None, config)
    x = inputs(2)[0].float()
    z, log_det = flow(x, None)
    assert (z == patchify(x, 2).flatten(1)).all()
    assert (log_det == 0).all()


def test_patches_are_row_major_with_channel_slowest_as_published() -> None:
    x = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6).float()
    tokens = patchify(x, 2)
    unfolded = torch.nn.functional.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
    assert (tokens == unfolded).all()
    assert (unpatchify(tokens, 2, 4) == x).all()


def test_a_dropped_label_is_the_mean_embedding() -> None:
    flow, x = randomised(), inputs(1)[0]
    dropped = float(flow.log_prob(x, None).detach())
    with torch.no_grad():
        for block in flow.blocks:
            block.class_embedding.copy_(block.class_embedding.mean(0, keepdim=True).expand(3, -1))  # type: ignore[operator, union-attr]
    assert float(flow.log_prob(x, torch.tensor([1])).detach()) == pytest.approx(dropped, abs=1e-12)


def test_volume_preserving_blocks_preserve_volume() -> None:
    flow, (x, y) = randomised(variant="volume_preserving"), inputs(3)
    _, log_det = flow(x, y)
    assert flow.log_std is not None
    assert (log_det + flow.log_std.sum()).abs().max() < 1e-12


def test_bounded_log_scales_stay_inside_and_are_not_clamped() -> None:
    flow = randomised(None, (1,), log_scale_bound=0.3)
    with torch.no_grad():
        flow.blocks[0].proj_out.bias[: flow.num_dims // 6] += 50  # type: ignore[index, operator, union-attr]
    x = inputs(4)[0]
    _, log_det = flow(x)
    features = flow.num_dims - 8  # the first token is never scaled
    assert log_det.abs().max() <= 0.3 * features
    assert log_det.abs().min() > 0.2 * features
    assert (flow.inverse(flow(x)[0]) - x).abs().max() < 1e-10


# -- guidance ---------------------------------------------------------------------------------------------------------


def reference_guided(flow: TarFlow, z: Tensor, y: Tensor | None, guidance: Guidance) -> Tensor:
    """The published rule without a cache: every token from two full forward passes."""
    tokens = z.reshape(len(z), -1, flow.event_shape[0] * flow.patch_size**2)
    for block in reversed(list(flow.blocks)):
        x = block.order(tokens).clone()
        last = x.shape[1] - 1
        for t in range(last):
            both = []
            for labels, temperature in ((y, 1.0), (None, guidance.attention_temperature)):
                h = block.proj_in(x) + block.order(block.position[None]) + block.condition(labels)
                for layer in block.layers:
                    h = tempered(layer, h, temperature)
                both.append(block.proj_out(h)[:, t].chunk(2, dim=-1))
            (scale, mean), (scale_weak, mean_weak) = both
            strength = guidance.scale * ((t + 1) / last if guidance.annealed else 1)
            if guidance.what != "mean":
                scale = scale + strength * (scale - scale_weak)
            if guidance.what != "log_scale":
                mean = mean + strength * (mean - mean_weak)
            x[:, t + 1] = x[:, t + 1] * scale.exp() + mean
        tokens = block.order(x)
    return unpatchify(tokens, flow.patch_size, flow.event_shape[1])


def tempered(layer: object, h: Tensor, temperature: float) -> Tensor:
    """A transformer layer whose attention logits are divided by ``temperature``, with the softmax written out."""
    q, k, v = layer._heads(h, None)  # type: ignore[attr-defined]
    logits = q @ k.mT / (q.shape[-1] ** 0.5 * temperature)
    logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    h = h + layer._merge(logits.softmax(dim=-1) @ v)  # type: ignore[attr-defined]
    return h + layer._mlp(h)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("num_classes", "guidance"),
    [
        (3, Guidance(scale=1.5)),
        (3, Guidance(scale=1.5, annealed=True)),
        (3, Guidance(scale=1.5, what="mean")),
        (3, Guidance(scale=1.5, what="log_scale")),
        (3, Guidance(scale=1.5, attention_temperature=0.5)),
        (None, Guidance(scale=1.5, attention_temperature=0.5, annealed=True)),
    ],
)
@torch.no_grad()
def test_guided_decoding_follows_the_published_rule(num_classes: int | None, guidance: Guidance) -> None:
    flow = randomised(num_classes)
    z = torch.randn(3, flow.num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = None if num_classes is None else torch.tensor([0, 1, 2])
    guided = flow.inverse(z, y, guidance)
    assert (guided - reference_guided(flow, z, y, guidance)).abs().max() < 1e-9
    assert (guided - flow.inverse(z, y)).abs().max() > 1e-3


def test_guidance_without_an_effect_is_refused() -> None:
    z = torch.zeros(1, randomised().num_dims, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"without classes needs an attention_temperature other than 1 \(got 1 and scale=1"
    ):
        randomised(None).inverse(z, None, Guidance(scale=1))
    with pytest.raises(ValueError, match=r"guidance needs labels \(got y=None and scale=1"):
        randomised().inverse(z, None, Guidance(scale=1))


def test_a_volume_preserving_flow_has_no_log_scale_to_guide() -> None:
    flow = randomised(variant="volume_preserving")
    z = torch.zeros(1, flow.num_dims, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no log-scales to guide \(got what=log_scale\)"):
        flow.inverse(z, torch.tensor([0]), Guidance(scale=1, what="log_scale"))


def test_activations_cannot_be_rebuilt() -> None:
    flow = randomised()
    with pytest.raises(ValueError, match=r"activations of TarFlow must be one of keep, checkpoint \(got rebuild\)"):
        flow.activations = "rebuild"


def test_samples_carry_gradients_when_asked() -> None:
    """For variational posteriors: the graph of the sequential decoder equals that of a decoder without a cache."""
    flow, y = randomised(), torch.tensor([1])
    z = torch.randn(1, flow.num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(flow.inverse(z.requires_grad_(), y).square().sum(), z)
    step, numeric = 1e-6, torch.zeros_like(z)
    with torch.no_grad():
        for i in range(z.shape[1]):
            shift = torch.zeros_like(z)
            shift[0, i] = step
            up, down = (flow.inverse(z + sign * shift, y).square().sum() for sign in (1, -1))
            numeric[0, i] = (up - down) / (2 * step)
    assert (gradient - numeric).abs().max() < 1e-5


def test_denoising_moves_by_the_score() -> None:
    """For the identity flow, log p = -x^2 / 2, so Tweedie's step is x (1 - std^2)."""
    flow = TarFlow(SHAPE, None, TarFlowConfig(patch_size=2, width=16, layers_per_block=(1, 1), head_width=8)).double()
    x = inputs(3)[0]
    assert (flow.denoised(x, None, 0.5) - 0.75 * x).abs().max() < 1e-12
    assert (flow.denoised(x, None, 0.5, strength=0.4) - 0.9 * x).abs().max() < 1e-12


@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {}])
def test_checkpointing_repeats_dropout(settings: dict[str, float]) -> None:
    flow, (x, y) = randomised(**settings).train(), inputs(3)
    found = []
    for activations in ("keep", "checkpoint"):
        flow.activations = activations  # type: ignore[assignment]
        torch.manual_seed(3)
        found.append(conformance.gradients(flow, x, y))
    assert conformance.relative_difference(found[1], found[0]) < 1e-12


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of model.patch_size \(got 8x8 and 3\)"):
        TarFlow((1, 8, 8), None, TarFlowConfig(patch_size=3, width=8, layers_per_block=(1,), head_width=8))
