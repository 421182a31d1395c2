"""The transformer layer: one token at a time with a cache equals all tokens at once."""

import pytest
import torch

from tarflow_scale.config.model import TarFlowConfig
from tarflow_scale.flows.attention import KeyValueCache, TransformerLayer
from tarflow_scale.flows.rotary import rotation


def transformer_layer(width: int, head_width: int, **options: object) -> TransformerLayer:
    sizes = {"patch_size": 1, "width": width, "head_width": head_width, "layers_per_block": (1,)}
    return TransformerLayer(TarFlowConfig.model_validate(sizes | options), width)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm": "rms", "qk_norm": True, "mlp": "gated"}], ids=["tarflow", "gemma"])
@torch.no_grad()
def test_steps_with_a_cache_equal_the_full_pass(key_heads: int, rotary: bool, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layers = [transformer_layer(16, 4, queries_per_key=4 // key_heads, **options).double().eval() for _ in range(2)]
    h = torch.randn(3, 6, 16, dtype=torch.float64)
    turn = rotation(2, 3, 4, False, 2.4, h) if rotary else None
    whole = layers[1](layers[0](h, turn), turn)
    cache = KeyValueCache(2, batch=3, heads=key_heads, tokens=6, head_width=4, like=h)
    for t in range(6):
        step, place = h[:, t : t + 1], None if turn is None else turn[:, t : t + 1]
        for index, layer in enumerate(layers):
            step = layer.step(step, cache, index, turn=place)
        cache.length += 1
        assert (step[:, 0] - whole[:, t]).abs().max() < 1e-12


def test_dropout_acts_in_training_only() -> None:
    layer = transformer_layer(8, 4, dropout=0.5)
    h = torch.randn(2, 3, 8)
    assert not torch.equal(layer.train()(h), layer(h))
    assert torch.equal(layer.eval()(h), layer(h))
