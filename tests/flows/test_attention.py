"""The transformer layer: one token at a time with a cache equals all tokens at once."""

import torch

from tarflow_scale.flows.attention import KeyValueCache, TransformerLayer


@torch.no_grad()
def test_steps_with_a_cache_equal_the_full_pass() -> None:
    torch.manual_seed(0)
    layers = [TransformerLayer(12, 4).double().eval() for _ in range(2)]
    h = torch.randn(3, 7, 12, dtype=torch.float64)
    whole = layers[1](layers[0](h))
    cache = KeyValueCache(2, batch=3, heads=3, tokens=7, head_width=4, like=h)
    for t in range(7):
        step = h[:, t : t + 1]
        for index, layer in enumerate(layers):
            step = layer.step(step, cache, index)
        cache.length += 1
        assert (step[:, 0] - whole[:, t]).abs().max() < 1e-12


def test_dropout_acts_in_training_only() -> None:
    layer = TransformerLayer(8, 4, dropout=0.5)
    h = torch.randn(2, 3, 8)
    assert not torch.equal(layer.train()(h), layer(h))
    assert torch.equal(layer.eval()(h), layer(h))
