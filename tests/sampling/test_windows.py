"""Attention of one token by the compiled C code, compared with PyTorch's."""

import logging
from collections.abc import Iterator

import pytest
import torch

from tarflow_scale.flows.rotary import rotate, rotation
from tarflow_scale.sampling.windows import OneQuery, WindowOfTokens


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CC", "no-such-compiler -with options")
    OneQuery.function.cache_clear()
    yield
    OneQuery.function.cache_clear()


def inputs(rows: int, heads: int, head_width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``qkv (R, 3 C)`` of one token and a full cache."""
    generator = torch.Generator().manual_seed(rows)
    qkv = torch.randn(rows, 3 * heads * head_width, generator=generator)
    cache = torch.randn(2, rows, heads, 21, head_width, generator=generator)
    return qkv.to(dtype), cache.to(dtype)


@pytest.mark.parametrize("position", [0, 1, 15, 20])
@pytest.mark.parametrize(("rows", "heads", "head_width"), [(1, 1, 64), (3, 2, 16), (16, 4, 64), (2, 3, 20), (1, 2, 1)])
@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str)
def test_equals_the_attention_of_pytorch(
    rows: int, heads: int, head_width: int, position: int, sharp: bool, dtype: torch.dtype, within: float
) -> None:
    assert (OneQuery.function(head_width, dtype) is None) == (head_width == 1 and dtype == torch.bfloat16)
    qkv, cache = inputs(rows, heads, head_width, dtype)
    sharpness = torch.linspace(0.5, 2, rows).view(rows, 1, 1, 1) if sharp else None
    wide = cache.double()
    expected = WindowOfTokens(position, position + 1).attend(qkv.double()[:, None], wide, sharpness)[:, 0]
    found = OneQuery(position).attend(qkv, cache, sharpness)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < within
    assert torch.equal(cache.double(), wide)  # the token's key and value are in their place, and nothing else moved


@pytest.mark.parametrize("position", [0, 7, 20])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 3e-6), (torch.bfloat16, 0.03)], ids=str)
def test_queries_share_keys_and_positions_rotate(
    heads: int, key_heads: int, position: int, dtype: torch.dtype, within: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(3, (heads + 2 * key_heads) * 16, generator=generator).to(dtype)
    cache = torch.randn(2, 3, key_heads, 21, 16, generator=generator).to(dtype)
    turn = rotation(3, 7, 16, False, 4.0, torch.zeros((), dtype=torch.float64))
    wide = cache.double()
    window = WindowOfTokens(position, position + 1)
    expected = window.attend(qkv.double()[:, None], wide, None, turn)[:, 0]
    found = OneQuery(position).attend(qkv, cache, None, turn)
    assert (found - expected).abs().max() < within
    assert (cache.double() - wide).abs().max() < (1e-6 if dtype == torch.float32 else 0.02)
    q, k, v = qkv.double().unflatten(1, (-1, 16)).split([heads, key_heads, key_heads], dim=1)
    keys = torch.cat([wide[0, :, :, :position], rotate(k[:, :, None], turn[:, position : position + 1])], dim=2)
    values = torch.cat([wide[1, :, :, :position], v[:, :, None]], dim=2)
    q = rotate(q[:, :, None], turn[:, position : position + 1])[:, :, 0]
    for head in range(heads):  # a second formula, head by head
        shared = head // (heads // key_heads)
        weights = torch.softmax((keys[:, shared] @ q[:, head, :, None])[..., 0] / 4, dim=-1)
        by_hand = (weights[:, None] @ values[:, shared])[:, 0]
        assert (expected.unflatten(1, (heads, 16))[:, head] - by_hand).abs().max() < 1e-12


def test_a_row_does_not_depend_on_the_others() -> None:
    qkv, cache = inputs(5, 2, 64, torch.float32)
    together = OneQuery(13).attend(qkv, cache, None)
    for row in range(5):
        alone = OneQuery(13).attend(qkv[row : row + 1], cache[:, row : row + 1].contiguous(), None)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_far_apart_and_what_is_not_a_number(dtype: torch.dtype) -> None:
    """The largest logit gets all weight if the others are far below; NaN and infinity affect their own row only."""
    qkv, cache = inputs(4, 2, 16, dtype)
    qkv = qkv * 100
    qkv[1, 3], qkv[2, 5] = torch.nan, torch.inf
    expected = WindowOfTokens(9, 10).attend(qkv.double()[:, None], cache.double(), None)[:, 0]
    found = OneQuery(9).attend(qkv, cache, None)
    for row in (0, 3):
        assert (found[row] - expected[row]).abs().max() < (1e-4 if dtype == torch.float32 else 1.0)
    for row in (1, 2):
        assert found[row, :16].isnan().all()
        assert not found[row, 16:].isnan().any()


def test_the_process_keeps_its_subnormal_numbers() -> None:
    """A library that is linked with -ffast-math makes the process that loads it flush subnormal numbers."""
    assert OneQuery.function(24, torch.float32) is not None
    assert (torch.tensor([1e-38]) * 0.01).item() > 0


def test_a_layout_that_the_code_does_not_know_is_refused() -> None:
    qkv, cache = inputs(4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="strides"):
        OneQuery(0).attend(qkv.T.contiguous().T, cache, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_narrower_than_the_cache_are_left_to_pytorch(dtype: torch.dtype) -> None:
    """Queries of a flow in half precision, or bf16 heads of odd width, whose cache is in fp32."""
    qkv, cache = inputs(4, 2, 16, torch.float32)
    qkv = qkv.to(dtype)
    expected = WindowOfTokens(9, 10).attend(qkv[:, None], cache.clone(), None)[:, 0]
    assert torch.equal(OneQuery(9).attend(qkv, cache, None), expected)


def test_fp64_is_left_to_pytorch() -> None:
    assert OneQuery.function(16, torch.float64) is None


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_pytorch_attends(caplog: pytest.LogCaptureFixture) -> None:
    qkv, cache = inputs(3, 2, 16, torch.float32)
    expected = WindowOfTokens(4, 5).attend(qkv[:, None], cache.clone(), None)[:, 0]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(OneQuery(4).attend(qkv, cache, None), expected)
    (record,) = caplog.records  # told once
    assert "no-such-compiler" in record.getMessage()


def test_what_a_compiler_said_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "cc -include no/such/header.h")
    OneQuery.function.cache_clear()
    assert OneQuery.function(16, torch.float32) is None
    OneQuery.function.cache_clear()
    assert "no/such/header.h" in caplog.text
