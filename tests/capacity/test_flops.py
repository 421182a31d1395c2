"""Formulas count the operations that PyTorch counts, except causal attention, of which PyTorch counts all."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tarflow_scale.autoencoders.stored import build_autoencoder
from tarflow_scale.capacity.flops import forward_flops, tokens_per_image, training_flops
from tarflow_scale.config.autoencoder import ConvolutionalConfig
from tarflow_scale.config.model import (
    DequantizationConfig,
    GlowConfig,
    MAFConfig,
    ModelConfig,
    NICEConfig,
    RealNVPConfig,
    TarFlowConfig,
)
from tarflow_scale.flows import build
from tarflow_scale.records import PixelFormat

TARFLOW = TarFlowConfig(patch_size=2, width=64, head_width=32, layers_per_block=(3, 1), class_conditional=False)
MODELS: list[ModelConfig] = [
    TARFLOW,
    TARFLOW.model_copy(update={"variant": "volume_preserving"}),
    TARFLOW.model_copy(update={"deep_width": 128, "mlp": "gated", "queries_per_key": 2, "start_token": True}),
    GlowConfig(levels=3, steps_per_level=2, width=32, convolution="dense", class_conditional=False),
    RealNVPConfig(levels=3, width=8, residual_blocks=2, class_conditional=False),
    NICEConfig(couplings=3, width=20, hidden_layers=2, class_conditional=False),
    NICEConfig(
        couplings=3,
        width=20,
        hidden_layers=2,
        class_conditional=False,
        dequantization=DequantizationConfig(couplings=3, width=10),
    ),
    MAFConfig(transforms=2, hidden_widths=(2304, 1500), class_conditional=False),
    GlowConfig(
        levels=2, steps_per_level=3, width=16, coupling="additive", convolution="dense", class_conditional=False
    ),
]


@pytest.mark.parametrize("config", MODELS, ids=lambda config: f"{config.kind}-{config}"[:40])
def test_the_formula_counts_what_pytorch_counts(config: ModelConfig) -> None:
    shape = (3, 16, 24)
    flow = build(config, shape).train()
    flow.pixels = PixelFormat(bit_depth=5, noise="uniform")
    flow.initialize(torch.randn(2, *shape).clamp(-1, 1))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others it does not count on CPU
        flow(torch.randn(2, *shape), dequantize=True)
    counted = counter.get_total_flops() / 2
    if isinstance(config, TarFlowConfig):
        attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / 2
        assert attention > 0
        counted -= attention / 2
    assert forward_flops(config, shape) == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize("posterior", ["learned", "fixed"])
@pytest.mark.parametrize("factor", [2, 8])
def test_the_formula_of_autoencoders_counts_what_pytorch_counts(factor: int, posterior: str) -> None:
    settings = {"factor": factor, "latent_channels": 3, "width": 8, "blocks": 2, "posterior": posterior}
    config, shape = ConvolutionalConfig.model_validate(settings), (3, 16, 24)
    autoencoder = build_autoencoder(config)
    with FlopCounterMode(display=False) as counter:
        autoencoder.decode(autoencoder.encode(torch.zeros(2, *shape)).mean)
    assert forward_flops(config, shape) == pytest.approx(counter.get_total_flops() / 2, rel=1e-12)
    assert tokens_per_image(config, shape) is None


def test_published_sizes() -> None:
    # reference: 1.03 TFLOP forward for 2-768-8-8 at 64 px, 10 % of them attention; three times as many in training
    imagenet64 = TarFlowConfig(patch_size=2, width=768, layers_per_block=(8,) * 8, class_conditional=False)
    assert forward_flops(imagenet64, (3, 64, 64)) == pytest.approx(1.03e12, rel=0.01)
    assert training_flops(imagenet64, (3, 64, 64)) == 3 * forward_flops(imagenet64, (3, 64, 64))
    assert tokens_per_image(imagenet64, (3, 64, 64)) == 1024
    assert tokens_per_image(MODELS[3], (3, 64, 64)) is None
