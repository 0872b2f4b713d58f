"""What a profile costs: of routers, of experts, of their hidden units, against a plain forward.

CPU time of this process with one thread, over the same tokens; the four take turns, medians of the
rounds. The plain forward uses transformers' default experts implementation and, like collecting,
computes only the last position's logits, so that nothing which both share flatters the ratio.
Beside the shipped models: random ones of 8 to 256 experts, as wide as published ones are beside
their hidden size, with 128 to 2048 tokens in a batch. What is read off the weights, once a pass, is
part of the cost, over as many tokens as the default run collects from.

    python experiments/bench/profile_cost.py                       all of it
    python experiments/bench/profile_cost.py --experts 256 --tokens 512 --hidden 256
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_lab.files import PACKAGE
from moe_lab.models import checkpoint
from moe_lab.profile.collect import collect_statistics

LIMITS = {"routers": 1.1, "all": 1.5, "all and neurons": 2.0}
SHAPES = {8: (2, 2.0), 32: (4, 1.0), 64: (6, 0.69), 128: (8, 0.375), 256: (8, 0.25)}
SHIPPED = PACKAGE / "checkpoints"
LENGTH = 128


def random_model(experts: int, hidden: int) -> PreTrainedModel:
    """Two layers of a Qwen2-MoE; SHAPES: experts for a token, and an expert's width by hidden."""
    torch.manual_seed(0)
    top_k, share = SHAPES[experts]
    width = int(share * hidden) // 16 * 16
    config = Qwen2MoeConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=width,
    )
    return Qwen2MoeForCausalLM(config).eval()


def batches_for(model: PreTrainedModel, number: int, tokens: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens without padding, so many in a batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (tokens // LENGTH, LENGTH)
    return [
        {
            "input_ids": torch.randint(model.config.vocab_size, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        for _ in range(number)
    ]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def costs(
    model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], rounds: int
) -> dict[str, float]:
    """Median CPU seconds of each kind of pass."""

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
    seconds = [[cpu_seconds(work) for work in passes.values()] for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
    return dict(zip(passes, medians, strict=True))


def judge(name: str, seconds: dict[str, float], kinds: tuple[str, ...]) -> bool:
    """Print each kind of pass against its limit; whether all are within it."""
    good = True
    for kind in kinds:
        ratio, limit = seconds[kind] / seconds["plain"], LIMITS[kind]
        good &= ratio <= limit
        print(
            f"{kind}, {name}: {ratio:.2f}x of a plain forward "
            f"({seconds[kind]:.2f} s against {seconds['plain']:.2f} s CPU), limit {limit}x: "
            f"{'PASS' if ratio <= limit else 'FAIL'}",
            flush=True,
        )
    return good


def main() -> int:
    """Measure the shipped models and a grid of random ones; 1 where a pass is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="*", choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for name in sorted(file.parent.name for file in SHIPPED.glob("*/config.json")):
        if given.experts is None:
            model = checkpoint.resolve(f"shipped:{name}", dtype="float32").load()
            good &= judge(name, costs(model, batches_for(model, 4, 2048), 7), tuple(LIMITS))
    for experts in given.experts or SHAPES:
        for hidden in given.hidden:
            model = random_model(experts, hidden)
            for tokens in given.tokens:
                batches = batches_for(model, 8192 // tokens, tokens)
                name = f"{experts} experts, hidden {hidden}, batches of {tokens} tokens"
                # A pass of routers ends before the last of two layers' experts: it says nothing.
                kinds = tuple(kind for kind in LIMITS if kind != "routers")
                good &= judge(name, costs(model, batches, given.rounds), kinds)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
