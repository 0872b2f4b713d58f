"""A condensed layer's forward against the MoE block it stands for, at every length.

Both are one layer of one model: the block with transformers' default experts implementation, and
the one dense MLP of its shared experts and as many routed ones as its router chooses, so that both
multiply the same number of rows. CPU time of one thread, float32; the two take turns, the
medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_lab.models import checkpoint
from moe_lab.models.condensing import condensed
from moe_lab.models.layers import moe_layers

LIMIT = 1.0
LENGTHS = [2**power for power in range(12)]


def wide() -> PreTrainedModel:
    """A random Qwen2-MoE of realistic widths: 64 experts of 352, top 6, hidden 512."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=512,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=704,
    )
    return Qwen2MoeForCausalLM(config).eval()


def seconds(module: nn.Module, x_BLD: Tensor, repeats: int) -> float:
    """CPU time of one forward, over so many."""
    started = time.thread_time()
    for _ in range(repeats):
        module(x_BLD)
    return (time.thread_time() - started) / repeats


@torch.inference_mode()
def medians(block: nn.Module, dense: nn.Module, x_BLD: Tensor, rounds: int) -> tuple[float, float]:
    """Median seconds of a forward of (the MoE block, the condensed layer), in turns."""
    seconds(block, x_BLD, 2)
    seconds(dense, x_BLD, 2)
    repeats = max(1, round(0.002 / seconds(block, x_BLD, 2)))
    pairs = [
        (seconds(block, x_BLD, repeats), seconds(dense, x_BLD, repeats)) for _ in range(rounds)
    ]
    return tuple(statistics.median(column) for column in zip(*pairs, strict=True))


def main() -> int:
    """Measure both shapes; 1 where the condensed layer is slower at any length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="turns of each (default 31)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    models = {
        "tiny_deepseek": lambda: checkpoint.resolve(
            "shipped:tiny_deepseek", dtype="float32"
        ).load(),
        "64 experts of 352": wide,
    }
    failed = False
    for name, make in models.items():
        model = make()
        layer = moe_layers(model)[0]
        top_k, implementation = layer.info.top_k, model.config._experts_implementation
        assert implementation != "eager", "the default implementation is what is compared with"
        dense = condensed(layer, range(top_k), [1 / top_k] * top_k, shared_gate=0.5)
        for length in LENGTHS:
            generator = torch.Generator().manual_seed(length)
            x_BLD = torch.randn(1, length, layer.info.hidden_size, generator=generator)
            block_seconds, dense_seconds = medians(layer.block, dense, x_BLD, rounds)
            ratio = dense_seconds / block_seconds
            failed |= ratio > LIMIT
            print(
                f"condensed layer, {name}, length {length}: {ratio:.2f}x of the MoE block "
                f"({dense_seconds * 1e6:.0f} us against {block_seconds * 1e6:.0f} us with "
                f"{implementation}), limit {LIMIT}x: {'FAIL' if ratio > LIMIT else 'PASS'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
