"""Attention of one token on a CPU: our C code against PyTorch's operator, in one run.

    python evals/benchmarks/one_query.py --output evals/results/one-query-cpu.json

Every position of a sequence in turn, in the cache of every layer, as in the decoding of a batch. Variants take turns,
and the median counts. The bandwidth of reference is that of a sum over a large tensor.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from sampling import copy_bandwidth, in_turns

from evals.benchmarks.measuring import Figure, write_results
from tarflow_scale.sampling.windows import OneQuery, Window, WindowOfTokens


def attention(window: Callable[[int], Window], qkv: torch.Tensor, cache: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call that attends at every position, in every layer."""

    def attend() -> torch.Tensor:
        out = qkv
        for position in range(cache.shape[4]):
            for layer in cache:
                out = window(position).attend(qkv, layer, None)
        return out

    return attend


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, heads, tokens = arguments.rows, arguments.heads, arguments.tokens
    cache = torch.randn(arguments.layers, 2, rows, heads, tokens, arguments.head_width)
    qkv = torch.randn(rows, 3 * heads * arguments.head_width)
    ours, bf16 = OneQuery, torch.bfloat16

    def pytorch(position: int) -> Window:
        return WindowOfTokens(position, position + 1)

    seconds = in_turns(
        {
            "pytorch fp32": attention(pytorch, qkv[:, None], cache),
            "ours fp32": attention(ours, qkv, cache),
            "pytorch bf16": attention(pytorch, qkv[:, None].to(bf16), cache.to(bf16)),
            "ours bf16": attention(ours, qkv.to(bf16), cache.to(bf16)),
        },
        arguments.rounds,
        "cpu",
    )
    calls = tokens * arguments.layers
    figures: dict[str, Figure] = {
        "fp32_over_pytorch": ("", seconds["pytorch fp32"] / seconds["ours fp32"], "times"),
        "bf16_over_pytorch": ("", seconds["pytorch bf16"] / seconds["ours bf16"], "times"),
        "bf16_over_pytorch_fp32": ("", seconds["pytorch fp32"] / seconds["ours bf16"], "times"),
        "fp32_microseconds": ("", seconds["ours fp32"] / calls * 1e6, "us a call"),
        "bf16_microseconds": ("", seconds["ours bf16"] / calls * 1e6, "us a call"),
        "fp32_of_bandwidth": (
            "",
            cache.nbytes * (tokens + 1) / 2 / seconds["ours fp32"] / copy_bandwidth("cpu"),
            "of it",
        ),
    }
    facts = {key: getattr(arguments, key) for key in ("rows", "heads", "head_width", "tokens", "layers", "rounds")}
    write_results(arguments.output, "cpu", figures, **facts)


if __name__ == "__main__":
    main()
