"""What collecting all routed statistics costs, against a plain forward over the same tokens.

CPU time of this process; each model takes both turns in alternation, medians of 5. The plain
forward uses transformers' default experts implementation and, like collecting, computes only the
last position's logits, so that nothing which both share flatters the ratio.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_lab import checkpoint
from moe_lab.statistics import collect

LIMIT, ROUNDS = 2.0, 5
NUM_BATCHES, BATCH_SIZE, LENGTH = 4, 16, 128  # as many tokens as the default run collects from


def wide() -> PreTrainedModel:
    """A random Qwen2-MoE of realistic widths: 64 experts of 352, top 6, hidden 512."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=704,
    )
    return Qwen2MoeForCausalLM(config).eval()


def batches_for(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Random tokens without padding."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, LENGTH)
    return [
        {
            "input_ids": torch.randint(model.config.vocab_size, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        for _ in range(NUM_BATCHES)
    ]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def cost(model: PreTrainedModel) -> tuple[float, float]:
    """Median CPU seconds of (a plain pass, a collecting pass)."""
    batches = batches_for(model)

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)

    def collecting() -> None:
        collect(model, batches)

    plain()
    collecting()
    rounds = [(cpu_seconds(plain), cpu_seconds(collecting)) for _ in range(ROUNDS)]
    return tuple(statistics.median(column) for column in zip(*rounds, strict=True))


def main() -> int:
    """Measure both models; 1 where one is over the limit."""
    models = {
        "tiny_deepseek": lambda: checkpoint.resolve(
            "shipped:tiny_deepseek", dtype="float32"
        ).load(),
        "64 experts of 352": wide,
    }
    failed = False
    for name, make in models.items():
        plain, collecting = cost(make())
        ratio = collecting / plain
        failed |= ratio > LIMIT
        print(
            f"profile cost, {name}: {ratio:.2f}x of a plain forward "
            f"({collecting:.2f} s against {plain:.2f} s CPU), limit {LIMIT}x: "
            f"{'FAIL' if ratio > LIMIT else 'PASS'}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
