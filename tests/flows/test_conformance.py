"""Every flow of the catalogue fulfils the contract. Tolerances are for float64 unless a test states others."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.flows import TarFlow, load_flow, save_flow
from tarflow_scale.flows.likelihood import add_noise, quantize
from tarflow_scale.records import PixelFormat
from tests.flows import conformance
from tests.flows.catalogue import FLOWS, FlowCase, moment_matched

every_flow = pytest.mark.parametrize("case", FLOWS, ids=lambda case: case.name)


@every_flow
@pytest.mark.parametrize("batch", [1, 3])
def test_the_log_determinant_is_autograds(case: FlowCase, batch: int) -> None:
    conformance.check_flow_log_det(case.flow(), *case.data(batch), case.log_det)


@every_flow
def test_the_inverse_is_exact_both_ways(case: FlowCase) -> None:
    conformance.check_flow_inverse(case.flow(), *case.data(5), case.inverse)


@every_flow
def test_the_inverse_is_close_in_fp32(case: FlowCase) -> None:
    x, y = case.data(5, dtype=torch.float32)
    flow = case.flow(torch.float32)
    with torch.no_grad():
        assert (flow.inverse(flow(x, y)[0], y) - x).abs().max() / x.abs().max() < 1e-4


@every_flow
def test_samples_have_the_density_that_log_prob_says(case: FlowCase) -> None:
    flow = case.flow()
    z = torch.randn(2, flow.num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    conformance.check_sample_density(flow, z, case.data(2)[1], case.log_det)


@every_flow
def test_the_surprise_of_values_adds_up_to_that_of_the_image(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(3)
    assert flow.divides_surprise
    nats = flow.nats_of_values(x, y)
    assert nats.shape == x.shape
    assert (nats.flatten(1).sum(dim=1) + flow.log_prob(x, y)).abs().max() < 1e-10
    assert nats.std() > 1e-3


@pytest.mark.parametrize(
    "case",
    [case for case in FLOWS if case.config.kind not in ("maf", "iaf") and case.config.logit_alpha is None],
    ids=lambda case: case.name,
)
def test_an_odd_patch_in_a_flat_image_has_all_the_surprise_of_a_flow_that_moves_nothing(case: FlowCase) -> None:
    """A new flow scales each value or rotates each place; only networks of MAF and IAF start random."""
    flow = case.fresh().double()
    flow.initialize(*case.data(16))
    flat = torch.zeros(1, *case.event_shape, dtype=torch.float64)
    odd = flat.clone()
    odd[:, :, :2, :2] = 3.0
    more = flow.eval().nats_of_values(odd) - flow.nats_of_values(flat)
    places = torch.zeros_like(flat)
    side = 4 if case.config.kind == "glow" else 2  # pixels of a place on the last level
    places[:, :, :side, :side] = 1
    assert more.sum() > 1
    assert (more * (1 - places)).abs().max() < 1e-9


@every_flow
def test_reparameterised_samples_come_with_their_density(case: FlowCase) -> None:
    flow, y = case.flow(), case.data(3)[1]
    with torch.no_grad():
        x, log_prob = flow.rsample_and_log_prob(3, y, torch.Generator().manual_seed(0))
        again = flow.sample(3, y, generator=torch.Generator().manual_seed(0))
        assert torch.equal(x, again) or (x - again).abs().max() < case.inverse
        assert (flow.log_prob(x, y) - log_prob).abs().max() < case.log_det


@every_flow
def test_the_density_integrates_to_one(case: FlowCase) -> None:
    conformance.check_density_integrates_to_one(case.dense())


@pytest.mark.parametrize("name", ["tarflow", "glow"])
def test_uniform_pixels_cost_what_the_closed_form_says(name: str) -> None:
    conformance.check_uniform_pixels_cost(moment_matched(name), conformance.MOMENT_MATCHED)
    if name == "tarflow":
        config = TarFlowConfig(patch_size=2, width=8, layers_per_block=(1,), head_width=8)
        identity = TarFlow((1, 2, 2), None, config).double()
        conformance.check_uniform_pixels_cost(identity, conformance.STANDARD_NORMAL)


@every_flow
def test_samples_of_a_batch_do_not_see_each_other(case: FlowCase) -> None:
    conformance.check_samples_are_independent(case.flow(), *case.data(3), max(1e-12, case.inverse / 100))


@every_flow
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_an_image_survives_encoding_byte_for_byte(case: FlowCase, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, *case.event_shape), dtype=torch.uint8, generator=generator)
    stored = quantize(images.double() / 127.5 - 1, bits, "nearest")
    x = add_noise(stored, torch.rand(images.shape, generator=generator), PixelFormat(bit_depth=bits, noise="uniform"))
    flow, y = case.flow(torch.float32), case.data(4)[1]
    with torch.no_grad():
        assert torch.equal(quantize(flow.inverse(flow(x, y)[0], y), bits, "floor"), stored)


@every_flow
def test_every_parameter_gets_a_gradient(case: FlowCase) -> None:
    flow = case.flow().train()
    found = conformance.gradients(flow, *case.data(8))
    assert found.keys() == {name for name, _ in flow.named_parameters()} | {"images"}
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        assert (gradient != 0).any(), name


@pytest.mark.parametrize(
    ("case", "activations"),
    [(case, how) for case in FLOWS for how in case.activations if how != "keep"],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_gradients_do_not_depend_on_what_is_kept(case: FlowCase, activations: str) -> None:
    flow = case.flow().train()
    expected = conformance.gradients(flow, *case.data(4))
    flow.activations = activations  # type: ignore[assignment]
    found = conformance.gradients(flow, *case.data(4))
    assert conformance.relative_difference(found, expected) < (1e-10 if activations == "checkpoint" else 1e-6)
    conformance.check_flow_log_det(flow, *case.data(1))


@every_flow
def test_a_saved_flow_is_the_same_to_the_bit(case: FlowCase, tmp_path: Path) -> None:
    flow = case.flow(torch.float32)
    save_flow(flow, str(tmp_path))
    x, y = case.data(3, dtype=torch.float32)
    loaded = load_flow(str(tmp_path))
    assert torch.equal(flow.log_prob(x, y), loaded.log_prob(x, y))
    z = torch.randn(3, flow.num_dims, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.inverse(z, y), loaded.inverse(z, y))


@every_flow
def test_labels_matter_exactly_where_there_are_classes(case: FlowCase) -> None:
    flow, (x, _) = case.flow(), case.data(1)
    if case.num_classes is None:
        with pytest.raises(ValueError, match="takes no labels"):
            flow.log_prob(x, torch.tensor([0]))
        return
    found = [float(flow.log_prob(x, torch.tensor([label])).detach()) for label in (-1, 0, 1, 2)]
    assert len({round(value, 9) for value in found}) == 4
    assert float(flow.log_prob(x, None).detach()) == pytest.approx(found[0], abs=1e-10)


@every_flow
def test_temperature_changes_samples_alone(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(3)
    before = flow.log_prob(x, y)
    assert torch.equal(flow.sample(3, y, temperature=0.0), flow.sample(3, y, temperature=0.0))
    warm, cold = (flow.sample(3, y, temperature=t, generator=torch.Generator().manual_seed(0)) for t in (1.0, 0.5))
    assert (warm - cold).abs().max() > 1e-3
    assert torch.equal(flow.log_prob(x, y), before)


@pytest.mark.parametrize(
    "case", [case for case in FLOWS if case.guided and case.num_classes], ids=lambda case: case.name
)
def test_guidance_of_strength_zero_changes_nothing_and_of_one_does(case: FlowCase) -> None:
    flow, y = case.flow(), torch.tensor([0, 1, 2])
    z = torch.randn(3, flow.num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = flow.inverse(z, y)
        assert torch.equal(flow.inverse(z, y, Guidance(scale=0)), plain)
        assert (flow.inverse(z, y, Guidance(scale=1)) - plain).abs().max() > 1e-3


@every_flow
def test_bf16_autocast_is_finite_and_keeps_the_maps_wide(case: FlowCase) -> None:
    flow, (x, y) = case.flow(torch.float32), case.data(4, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = flow(x, y)
        back = flow.inverse(z, y)
    assert z.dtype == log_det.dtype == back.dtype == torch.float32
    with torch.no_grad():
        exact, exact_log_det = flow(x, y)
    assert (z - exact).abs().max() < 0.3
    assert (log_det - exact_log_det).abs().max() < 0.05 * flow.num_dims
    assert torch.isfinite(back).all()


@pytest.mark.parametrize("case", [case for case in FLOWS if not case.guided], ids=lambda case: case.name)
def test_guidance_is_refused_where_there_is_none(case: FlowCase) -> None:
    flow, y = case.flow(), case.data(3)[1]
    with pytest.raises(ValueError, match=r"does not support guidance \(got scale=1.0\)"):
        flow.sample(3, y, guidance=1.0)


@pytest.mark.parametrize("case", [case for case in FLOWS if case.same_in_training], ids=lambda case: case.name)
def test_training_and_evaluation_mode_agree(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(3)
    assert torch.equal(flow.train().log_prob(x, y), flow.eval().log_prob(x, y))


@every_flow
def test_shapes_and_values_that_do_not_fit_are_named(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(2)
    with pytest.raises(ValueError, match=rf"latents must have shape \(batch, {flow.num_dims}\) \(got \(2, 7\)\)"):
        flow.inverse(torch.zeros(2, 7, dtype=torch.float64), y)
    if y is not None:
        for use in (lambda: flow(x, y[:1]), lambda: flow.inverse(flow(x, y)[0], y[:1])):
            with pytest.raises(ValueError, match=r"labels must have shape \(2,\) \(got \(1,\)\)"):
                use()
    with pytest.raises(ValueError, match=r"images must have shape \(batch, .*\) \(got \(2, 5, "):
        flow(torch.zeros(2, 5, *case.event_shape[1:], dtype=torch.float64), y)
    with pytest.raises(ValueError, match="images must have shape"):
        flow(x[:, :, 1:], y)
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[1, 0, 0, 0] = bad
        with pytest.raises(ValueError, match=r"images must be finite \(got 1 values that are not\)"):
            flow.log_prob(broken, y)


SOLVED = [case for case in FLOWS if case.config.kind == "continuous"]
CLOSED = [case for case in FLOWS if case.config.kind != "continuous"]
ONE_OF_EACH = [
    next(case for case in CLOSED if case.config.kind == kind) for kind in dict.fromkeys(c.config.kind for c in CLOSED)
]


@pytest.mark.parametrize("case", CLOSED, ids=lambda case: case.name)
def test_log_prob_goes_through_vmap(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(3)
    expected = flow.log_prob(x, y)
    if y is None:
        found = torch.vmap(lambda v: flow.log_prob(v[None])[0])(x)
    else:
        found = torch.vmap(lambda v, label: flow.log_prob(v[None], label[None])[0])(x, y)
    assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("case", CLOSED, ids=lambda case: case.name)
def test_log_prob_has_second_derivatives(case: FlowCase) -> None:
    """By autograd twice, and by torch.func forward over reverse, compared with differences of first derivatives."""
    flow, (x, y) = case.flow(), case.data(1)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))

    def score(at: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        return torch.autograd.grad(flow.log_prob(at, y).sum(), at, create_graph=create_graph)[0]

    step = 1e-5
    ends = [score((x + side * step * direction).requires_grad_()) for side in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    at = x.clone().requires_grad_()
    (twice,) = torch.autograd.grad((score(at, create_graph=True) * direction).sum(), at)
    size = float(expected.abs().max())
    assert size > 1e-2
    assert (twice - expected).abs().max() < 1e-3 * size  # differences are no more exact near the ends of a logit
    gradient = torch.func.grad(lambda v: flow.log_prob(v, y).sum())
    assert (torch.func.jvp(gradient, (x,), (direction,))[1] - twice).abs().max() < 1e-9 * size


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_sampling_goes_through_vmap_and_forward_mode(case: FlowCase) -> None:
    flow = case.flow()
    z, direction = torch.randn(2, 3, flow.num_dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = flow.inverse(z)
    assert (torch.vmap(lambda one: flow.inverse(one[None])[0])(z) - expected).abs().max() < 1e-10
    step = 1e-5
    slope = (flow.inverse(z + step * direction) - flow.inverse(z - step * direction)) / (2 * step)
    assert (torch.func.jvp(flow.inverse, (z,), (direction,))[1] - slope).abs().max() < 1e-6 * slope.abs().max()


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_torch_func_takes_gradients_whatever_is_kept(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(2)
    expected = torch.func.grad(lambda v: flow.log_prob(v, y).sum())(x)
    for flow.activations in case.activations:
        assert torch.equal(torch.func.grad(lambda v: flow.log_prob(v, y).sum())(x), expected)


def test_second_derivatives_are_not_rebuilt() -> None:
    case = next(case for case in FLOWS if case.config.kind == "glow")
    flow, (x, y) = case.flow(), case.data(2)
    flow.activations = "rebuild"
    with pytest.raises(ValueError, match=r"need activations=keep \(got rebuild\); set flow.activations = 'keep'"):
        torch.autograd.grad(flow.log_prob(x.requires_grad_(), y).sum(), x, create_graph=True)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_denoising_works_in_inference_mode(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(2)
    expected = flow.denoised(x, y, 0.1)
    with torch.inference_mode():
        assert torch.equal(flow.denoised(x.clone(), None if y is None else y.clone(), 0.1), expected)


def test_second_derivatives_by_parameters_need_images_that_require_gradients() -> None:
    case = next(case for case in FLOWS if case.name == "tarflow_conditional")
    flow, (x, y) = case.flow(), case.data(2)
    weight = flow.blocks[0].proj_in.weight  # type: ignore[union-attr, index]
    with pytest.raises(
        ValueError, match=r"^second derivatives of log_prob need x.requires_grad=True .*; call x.requires_grad_\(\)"
    ):
        torch.autograd.grad(flow.log_prob(x, y).sum(), weight, create_graph=True)
    (slope,) = torch.autograd.grad(flow.log_prob(x.requires_grad_(), y).sum(), weight, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), weight)[0].abs().max() > 0


@pytest.mark.parametrize("case", SOLVED, ids=lambda case: case.name)
def test_a_solver_says_what_it_does_not_go_through(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(2)
    with pytest.raises(ValueError, match="must not be called inside vmap or torch.func, which hide the values"):
        torch.vmap(lambda v: flow.log_prob(v[None])[0])(x)
    with pytest.raises(ValueError, match="must not be called inside vmap"):
        torch.func.grad(lambda v: flow.log_prob(v, y).sum())(x)
    with pytest.raises(ValueError, match=r"needs? fp32 or fp64 \(got torch.float16\); use flow.float\(\)"):
        flow.half().log_prob(x.half(), y)


@every_flow
def test_a_copied_or_pickled_flow_is_the_same_to_the_bit(case: FlowCase) -> None:
    flow, (x, y) = case.flow(torch.float32), case.data(3, dtype=torch.float32)
    with torch.no_grad():
        expected = flow.log_prob(x, y)  # what a flow keeps from a first use must not be in the way
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    for again in (
        copy.deepcopy(flow),
        pickle.loads(pickle.dumps(flow)),
        torch.load(file, weights_only=False),
    ):
        with torch.no_grad():
            assert torch.equal(again.log_prob(x, y), expected)


@pytest.mark.gpu
@every_flow
def test_cuda_equals_cpu(case: FlowCase) -> None:
    flow, (x, y) = case.flow(), case.data(4)
    with torch.no_grad():
        z, log_det = flow(x, y)
        z_cuda, log_det_cuda = flow.cuda()(x.cuda(), None if y is None else y.cuda())
        assert (z - z_cuda.cpu()).abs().max() < 1e-9
        assert (log_det - log_det_cuda.cpu()).abs().max() < 1e-9
        assert (flow.inverse(z_cuda, None if y is None else y.cuda()).cpu() - x).abs().max() < 1e-9
