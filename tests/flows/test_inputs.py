"""Arguments of users: each mistake gives one line, and valid input gives no error or warning."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tarflow_scale.config.model import (
    ContinuousConfig,
    GlowConfig,
    ModelConfig,
    NICEConfig,
    RealNVPConfig,
    TarFlowConfig,
)
from tarflow_scale.config.sampling import Guidance
from tarflow_scale.errors import ConfigError
from tarflow_scale.flows import Flow, build
from tarflow_scale.flows.inputs import check_stored, check_values
from tarflow_scale.flows.likelihood import add_noise
from tarflow_scale.records import PixelFormat
from tests.conftest import command

SHAPE = (3, 8, 8)


def flow_of(logit_alpha: float | None = None) -> Flow:
    torch.manual_seed(0)
    config = TarFlowConfig(
        patch_size=4, width=8, head_width=8, layers_per_block=(1,), logit_alpha=logit_alpha, class_conditional=False
    )
    flow = build(config, SHAPE).eval()
    flow.pixels = PixelFormat(bit_depth=8, noise="uniform")
    return flow


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_images_on_0_to_255_are_refused(images: Tensor) -> None:
    for flow in (flow_of(), flow_of(logit_alpha=0.05)):
        for density in (flow.log_prob, flow.log_prob_of_images, flow.nats_of_values):
            with pytest.raises(ValueError, match=r"^images .* \(got 0 to 255\); use x / 127.5 - 1 .*$"):
                density(images.float())
    dark = torch.zeros(1, *SHAPE)
    dark[..., :2] = 200.0  # most of a digit is black
    with pytest.raises(ValueError, match=r"must be on \[-1, 1\] \(got 0 to 200\)"):
        flow_of().log_prob(dark)


def test_images_on_0_to_1_are_warned_about(images: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"seem to be on \[0, 1\].*use 2 \* x - 1"):
        flow_of().log_prob(images.float() / 255)
    with pytest.warns(UserWarning, match="seem to be on"):
        flow_of().log_prob((images > 127).float())


def test_standardised_images_are_warned_about(images: Tensor) -> None:
    natural = images.float() / 255
    digits = torch.where(images > 230, 1.0, 0.0)
    for x in ((natural - 0.45) / 0.225, (digits - 0.1307) / 0.3081):
        with pytest.warns(UserWarning, match=r"% of the values of these images are beyond \+-1.5 .* reverse the"):
            flow_of().log_prob(x)


def test_what_is_right_raises_no_warning(images: Tensor) -> None:
    flow = flow_of()
    noisy = add_noise(images, torch.rand(images.shape), PixelFormat(bit_depth=8, noise="uniform"))
    bright = noisy.clamp(min=0.2)
    unknown = flow_of()
    unknown.pixels = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = flow.sample(64, temperature=0.5, seed=0)
        for x in (noisy, bright, torch.zeros_like(noisy), noisy[:0], samples, 0.3 + 0.1 * noisy, 1.4 * noisy):
            assert flow.log_prob(x).shape == (len(x),)
        unknown.log_prob(images.float())  # nothing says that these are pixels
        flow_of(logit_alpha=0.05).log_prob(flow_of(logit_alpha=0.05).sample(64, seed=0))


def test_values_without_density_under_logits_are_refused() -> None:
    x = torch.zeros(2, *SHAPE)
    x[1, 0, 0, 0] = 1.2  # the data end at 1 / 0.9
    with pytest.raises(ValueError, match=r"model.logit_alpha=0.05 must lie inside \+-1.11111.*\(got 0 to 1.2\)"):
        flow_of(logit_alpha=0.05).log_prob(x)


def test_integers_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^images must be floats on \[-1, 1\] \(got torch.uint8\); .*image_tensor"):
        flow_of().log_prob(images)


def test_what_is_advised_for_integers_and_arrays_is_taken(tmp_path: Path) -> None:
    """Also for channels that come last; in a process without the checks of annotations of these tests."""
    code = """
import numpy as np, torch, tarflow_scale
from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.density import image_bits_per_dim
from tarflow_scale.flows import build
from tarflow_scale.records import PixelFormat
config = TarFlowConfig(patch_size=4, width=8, head_width=8, layers_per_block=(1,), class_conditional=False)
flow = build(config, (3, 8, 8)).eval()
flow.pixels = PixelFormat(bit_depth=8, noise="uniform")
images = torch.arange(4 * 192).reshape(4, 3, 8, 8).to(torch.uint8)
last, expected = images.permute(0, 2, 3, 1), image_bits_per_dim(flow, images.numpy())
kinds = (images, last, images.long(), images.numpy(), last.numpy(), last.numpy().astype(np.int64), last.numpy() / 256)
for x in kinds:
    try:
        flow.log_prob(x)
    except ValueError as error:
        advice = str(error).partition("; ")[2]
        start = "tarflow_scale.density" if "bits/dim" in advice else "torch."
        found = eval(advice[advice.index(start) :].partition(" to get bits/dim")[0])
        print(bool((found == expected).all()) if "bits/dim" in advice else tuple(flow.log_prob(found).shape))
try:
    image_bits_per_dim(flow, last.numpy())
except ValueError as error:
    print(error)
"""
    (tmp_path / "used.py").write_text(code)
    found = command(module="used", cwd=tmp_path)
    assert found.stdout.splitlines() == [
        *["True"] * 6,
        "(4,)",
        "images must have shape (batch, 3, 8, 8) (got (4, 8, 8, 3)); put the channels first with "
        "x.transpose(0, 3, 1, 2)",
    ], found.stderr


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on the device of the flow's weights, cpu \(got meta\); use x.to\('cpu'\)"):
        flow_of().log_prob(torch.zeros(2, *SHAPE, device="meta"))


def test_pixels_are_made_of_finite_floats_on_a_scale(images: Tensor) -> None:
    """Without the check, bytes would become white pixels, and NaN black ones."""
    with pytest.raises(
        ValueError, match=r"^images to convert to pixels must be floats on \[-1, 1\] \(got torch.uint8\)"
    ):
        check_stored(images, SHAPE)
    flow = flow_of()
    with pytest.raises(ValueError, match="pixels must be finite"):
        flow.pictures(torch.full((2, *SHAPE), float("nan")))
    with pytest.raises(ValueError, match=r"x\[None\]"):
        check_stored(torch.zeros(SHAPE), SHAPE)


@pytest.mark.parametrize("kind", [TarFlowConfig, GlowConfig, NICEConfig, RealNVPConfig, ContinuousConfig])
def test_shapes_and_counts_that_no_flow_has(kind: type[ModelConfig]) -> None:
    sizes = {
        TarFlowConfig: {"patch_size": 4, "width": 8, "head_width": 8, "layers_per_block": (1,)},
        GlowConfig: {"levels": 1, "steps_per_level": 1, "width": 4},
        RealNVPConfig: {"levels": 1, "width": 4, "residual_blocks": 1},
    }
    config = kind.model_validate({"class_conditional": True, **sizes.get(kind, {})})
    flow = build(config, [3, 8, 8], 2)  # as JSON and notebooks have it
    assert flow.event_shape == SHAPE
    flow.check_shape(torch.zeros(2, *SHAPE))
    shapes: list[list[int]] = [[8, 8], [], [0, 8, 8], [-3, 8, 8]]
    for shape in shapes:
        with pytest.raises(
            ConfigError, match=r"^event_shape must be \(channels, height, width\) or \(dimensions,\) \(got"
        ):
            build(config, shape, 2)
    with pytest.raises(ConfigError, match=r"^num_classes must be an integer >= 1, or None \(got -1\)"):
        build(config, SHAPE, -1)


def test_another_precision_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"weights, torch.float32 \(got torch.float64\); use x.to\(torch.float32\)"):
        flow_of().log_prob(images.double() / 127.5 - 1)


def test_channels_last_and_single_images_are_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"\(batch, 3, 8, 8\) \(got \(2, 8, 8, 3\)\); .*x.permute\(0, 3, 1, 2\)"):
        flow_of().log_prob(torch.zeros(2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"\(got \(3, 8, 8\)\); .*x\[None\]"):
        flow_of().log_prob(torch.zeros(3, 8, 8))


def test_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^images must be a tensor \(got a NumPy array of float32\); use torch"):
        check_values(np.zeros((2, *SHAPE), np.float32), SHAPE, torch.zeros(()), None, None)


def test_numbers_that_no_sampling_can_have_are_refused() -> None:
    flow = flow_of()
    for temperature in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^temperature must be a finite number >= 0 \(got .*\); use 1 to sample"):
            flow.sample(1, temperature=temperature)
    for size in (0, -3):
        with pytest.raises(ValueError, match=rf"^batch_size must be an integer >= 1, or None \(got {size}\)"):
            flow.sample(1, batch_size=size)
    with pytest.raises(ValueError, match=r"^the number of samples must be an integer >= 0 \(got -1\)"):
        flow.sample(-1)
    with pytest.raises(ValueError, match=r"^the number of samples must be an integer >= 0 \(got -1\)"):
        flow.rsample_and_log_prob(-1)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"^seed must be an integer in 0..2\^64-1 \(got {seed}\)"):
            flow.sample(1, seed=seed)
    with pytest.raises(ConfigError, match=r"^Guidance: scale: .* \(got -1.0\)$"):
        flow.sample(1, guidance=-1.0)


def test_a_section_without_its_sizes_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^GlowConfig: levels: required argument is missing; pass levels=VALUE; .*$"):
        GlowConfig()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(ConfigError, match=r"^TarFlowConfig: width must be a multiple of head_width .*$"):
        TarFlowConfig(patch_size=2, width=10, head_width=8, layers_per_block=(1,))
    with pytest.raises(ConfigError, match=r"^Guidance: scales: unknown key \(did you mean scale\?\)"):
        Guidance(scales=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_types_that_annotations_rule_out_are_one_line_and_compilers_and_tracers_skip_the_look_at_values(
    tmp_path: Path,
) -> None:
    """In a process without the checks of annotations of these tests."""
    code = """
import warnings
import numpy as np, torch
from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.errors import ConfigError
from tarflow_scale.density import interpolated
from tarflow_scale.flows import build
from tarflow_scale.flows.likelihood import combine_draws
config = TarFlowConfig(patch_size=4, width=8, head_width=8, layers_per_block=(1,))
flow = build(config, (1, 4, 4), 3).eval()
x = torch.zeros(2, 1, 4, 4)
for use in (
    lambda: flow.log_prob(np.zeros((2, 1, 4, 4))),
    lambda: flow.log_prob([[0.0]]),
    lambda: flow.sample(2.5),
    lambda: flow.sample(2, seed=1.5),
    lambda: flow.sample(2, batch_size=True),
    lambda: flow.sample(2, temperature="1"),
    lambda: flow.sample(2, generator=3),
    lambda: flow.sample(2, guidance={"scale": 1}),
    lambda: flow.log_prob(x, b"ab"),
    lambda: flow.inverse(torch.zeros(16)),
    lambda: combine_draws(torch.zeros(1, 2), "Mean"),  # this was importance
    lambda: interpolated(flow, x[0], x[1], 3, path="Line"),  # and this an arc
    lambda: build(config, (1, 4.0, 4), 3),
    lambda: flow.log_prob(x, 1.5),
    lambda: flow.sample(2, y={1}),
):
    try:
        use()
    except (ValueError, ConfigError) as error:
        print(error)
warnings.simplefilter("ignore")
flow.requires_grad_(False)
other = torch.rand(2, 1, 4, 4) - 0.5
for seen in (
    torch.jit.trace(lambda v: flow.log_prob(v), x, check_trace=False),
    torch.compile(flow.log_prob, backend="eager", fullgraph=True),
):
    print(torch.allclose(seen(other), flow.log_prob(other), atol=1e-4))
"""
    (tmp_path / "used.py").write_text(code)
    found = command(module="used", cwd=tmp_path)
    assert found.stdout.splitlines() == [
        "images must be a tensor (got a NumPy array of float64); use torch.as_tensor(x, dtype=torch.float32)",
        "images must be a tensor (got builtins.list); convert an array with torch.as_tensor(x)",
        "the number of samples must be an integer >= 0 (got 2.5); correct it",
        "seed must be an integer in 0..2^64-1 (got 1.5); choose another",
        "batch_size must be an integer >= 1, or None (got True); None decodes all samples together",
        "temperature must be a finite number >= 0 (got '1'); use 1 to sample the model",
        "generator must be a torch.Generator (got 3); pass a number as seed",
        "guidance must be a tarflow_scale.flows.Guidance or a number (got {'scale': 1})",
        "labels must be a tensor, one class by number or name, or a list of classes (got b'ab'); correct them",
        "latents must have shape (batch, 16) (got (16,)); pass one number per dimension of x",
        "estimate must be mean or importance, with at least 1 draw (got 'Mean' and 1 draws); correct it",
        "path must be arc or line, and num at least 2 (got 'Line' and 3); correct it",
        "event_shape must be (channels, height, width) or (dimensions,) (got (1, 4.0, 4)); correct it",
        "labels must be a tensor, one class by number or name, or a list of classes (got 1.5); correct them",
        "labels must be a tensor, one class by number or name, or a list of classes (got {1}); correct them",
        "True",
        "True",
    ], found.stderr
