"""What a profile costs: of routers, of experts, of their hidden units, against a plain forward.

CPU time of this process with one thread, over the same tokens; the four take turns, medians of the
rounds. The plain forward uses transformers' default experts implementation and, like collecting,
computes only the last position's logits, so that nothing which both share flatters the ratio.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_lab.files import PACKAGE
from moe_lab.models import checkpoint
from moe_lab.profile.collect import collect_statistics

LIMITS = {"routers": 1.1, "all": 2.0, "all and neurons": 2.0}
ROUNDS = 7
NUM_BATCHES, BATCH_SIZE, LENGTH = 4, 16, 128  # as many tokens as the default run collects from
SHIPPED = PACKAGE / "checkpoints"


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


def costs(model: PreTrainedModel) -> dict[str, float]:
    """Median CPU seconds of each kind of pass."""
    batches = batches_for(model)

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)

    passes = {
        "plain": plain,
        "routers": lambda: collect_statistics(model, batches, only_routers=True),
        "all": lambda: collect_statistics(model, batches),
        "all and neurons": lambda: collect_statistics(model, batches, neurons=True),
    }
    for work in passes.values():
        work()
    rounds = [[cpu_seconds(work) for work in passes.values()] for _ in range(ROUNDS)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    return dict(zip(passes, medians, strict=True))


def main() -> int:
    """Measure every shipped model and a wide one; 1 where a pass is over its limit."""
    torch.set_num_threads(1)
    names = sorted(file.parent.name for file in SHIPPED.glob("*/config.json"))
    failed = False
    for name in (*names, "64 experts of 352"):
        shipped = name in names
        model = checkpoint.resolve(f"shipped:{name}", dtype="float32").load() if shipped else wide()
        seconds = costs(model)
        for kind, limit in LIMITS.items():
            ratio = seconds[kind] / seconds["plain"]
            failed |= ratio > limit
            print(
                f"{kind}, {name}: {ratio:.2f}x of a plain forward "
                f"({seconds[kind]:.2f} s against {seconds['plain']:.2f} s CPU), limit {limit}x: "
                f"{'FAIL' if ratio > limit else 'PASS'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
