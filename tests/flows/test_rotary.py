"""Rotary positions, compared with rotations of complex numbers that are computed one by one."""

import cmath

import pytest
import torch

from tarflow_scale.config.model import DequantizationConfig, TarFlowConfig
from tarflow_scale.flows import TarFlow, build
from tarflow_scale.flows.rotary import PREFIX_PAIRS, rotate, rotation
from tarflow_scale.records import PixelFormat
from tests.flows import conformance
from tests.flows.catalogue import FLOWS


@pytest.mark.parametrize("has_prefix", [False, True])
@pytest.mark.parametrize(("height", "width", "side"), [(3, 3, 3.0), (2, 6, 5.0)])
def test_pairs_are_complex_numbers_that_turn(has_prefix: bool, height: int, width: int, side: float) -> None:
    head_width = 32
    x = torch.randn(2, height * width + has_prefix, head_width, dtype=torch.float64)
    rotated = rotate(x, rotation(height, width, head_width, has_prefix, side, x))
    pairs = (head_width // 2 - PREFIX_PAIRS * has_prefix) // 2
    unit = side / (height * width) ** 0.5
    for place in range(x.shape[1]):
        token = place - has_prefix
        row, column = divmod(token, width)
        for pair in range(head_width // 2):
            axis = (row, column)[pair // pairs] if pair < 2 * pairs and token >= 0 else 0
            angle = axis * unit * 10_000 ** -((pair % pairs) / pairs)
            for sample in range(2):
                before = complex(*x[sample, place, 2 * pair : 2 * pair + 2].tolist())
                after = complex(*rotated[sample, place, 2 * pair : 2 * pair + 2].tolist())
                assert abs(after - before * cmath.exp(1j * angle)) < 1e-12


def test_products_depend_on_differences_of_places() -> None:
    like = torch.zeros((), dtype=torch.float64)
    turn = rotation(5, 5, 16, False, 5.0, like).unflatten(1, (5, 5))
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def product(of: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
        return rotate(q[None], turn[:, of[0], of[1], None])[0] @ rotate(k[None], turn[:, to[0], to[1], None])[0]

    assert (product((1, 1), (0, 3)) - product((4, 2), (3, 4))).abs() < 1e-12
    assert (product((1, 1), (0, 3)) - product((1, 1), (3, 0))).abs() > 1e-3


def starflow() -> TarFlow:
    (case,) = (case for case in FLOWS if case.name == "tarflow_starflow")
    flow = case.flow()
    assert isinstance(flow, TarFlow)
    return flow


def test_a_flow_takes_images_of_another_size() -> None:
    flow, y = starflow(), torch.tensor([2])
    larger = flow.resized(8, 4)
    assert larger.event_shape == (1, 8, 4)
    assert all(a is b for a, b in zip(flow.parameters(), larger.parameters(), strict=True))
    x = torch.rand(1, 1, 8, 4, dtype=torch.float64)
    conformance.check_flow_log_det(larger, x, y)
    z = torch.randn(1, 32, dtype=torch.float64)
    conformance.check_sample_density(larger, z, y)
    same = flow.resized(4, 6)
    x = torch.rand(2, 1, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(same.log_prob(x), flow.log_prob(x))


def test_learned_noise_goes_with_a_flow_of_another_size() -> None:
    noise = DequantizationConfig(couplings=2, width=4)
    sizes = {"patch_size": 2, "width": 8, "head_width": 8, "layers_per_block": (1,), "class_conditional": False}
    config = TarFlowConfig.model_validate(sizes | {"positions": "rotary", "dequantization": noise})
    flow = build(config, (1, 4, 4), None)
    assert isinstance(flow, TarFlow)
    flow.pixels = PixelFormat(bit_depth=8, noise="uniform")
    larger = flow.resized(8, 4)
    assert larger.state_dict().keys() == flow.state_dict().keys()
    assert torch.isfinite(larger.log_prob_of_images(torch.rand(2, 1, 8, 4) * 2 - 1)).all()


def test_positions_of_another_size_stay_in_the_range_of_training() -> None:
    flow = starflow()
    larger = flow.resized(16, 24)
    first, second = (
        part.blocks[0].turn(torch.zeros((), dtype=torch.float64))  # type: ignore[operator]
        for part in (flow, larger)
    )
    assert (first.shape[1], second.shape[1]) == (2 * 3, 8 * 12)
    angles = [torch.atan2(turn[1, :, 0], turn[0, :, 0]).max().item() for turn in (first, second)]
    assert angles == pytest.approx([1.0, 7 * 0.25])  # the last rows: of 2 rows one apart, of 8 a quarter apart


def test_learned_positions_have_one_size() -> None:
    config = TarFlowConfig(patch_size=2, width=8, head_width=8, layers_per_block=(1,), class_conditional=False)
    with pytest.raises(ValueError, match=r"need model.positions=rotary .*; train a model with rotary positions"):
        build(config, (1, 4, 4), None).resized(8, 8)  # type: ignore[operator]
