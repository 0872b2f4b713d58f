"""The greedy search for layers against brute force, at the reference's depth: 9 of 27 MoE layers.

The brute force runs the whole model for every candidate of every step, as the method's released
scripts do. Counted is how often a decoder layer really runs over the calibration set; CPU time of
one thread, for both with the experts given. It runs in full, so that all choices are compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from expert_search import Sum, calibration, condensed, js, states_after
from torch import Tensor
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_lab.methods.condense.method import Condense
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile

MOST_EVALUATIONS = 0.6
EXPERTS = [0, 1]  # of every condensed layer


def random_model(num_layers: int) -> PreTrainedModel:
    """A dense layer, then MoE layers of 8 experts, top 2, with a shared one."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[0],
    )
    model = Qwen2MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
    return model


def brute_force(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    statistics: list[LayerStatistics],
    num_layers: int,
) -> tuple[int, ...]:
    """The layers in order of choice, with a forward of the whole model for each candidate."""
    blocks = {}
    for one in statistics:
        gates = one.mean("gate_sum").tolist()
        shared = float(one["shared_gate_sum"] / one["tokens"])
        block = model.model.layers[one.info.index].mlp
        blocks[one.info.index] = Sum(block, {i: gates[i] for i in EXPERTS}, shared)
    intact = states_after(model, batches, -2)
    order: list[int] = []
    for _ in range(num_layers):
        values = {}
        for index in sorted(set(blocks) - set(order)):
            with ExitStack() as stack:
                for one in (*order, index):
                    stack.enter_context(condensed(model, one, blocks[one]))
                found = states_after(model, batches, -2)
            means = [js(u, v).mean() for u, v in zip(intact, found, strict=True)]
            values[index] = float(torch.stack(means).mean())
        order.append(min(values, key=values.__getitem__))
    return tuple(order)


def ours(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    statistics: list[LayerStatistics],
    num_layers: int,
) -> tuple[int, ...]:
    """The same by the library's search."""
    method = Condense(num_layers, len(EXPERTS), EXPERTS, "greedy_js")
    return method.plan(Profile(statistics, lambda: LayerStream(model, batches))).layer_order


def counted(model: PreTrainedModel, work: Callable[[], tuple]) -> tuple[tuple, int, float]:
    """(what `work` gives, how often a decoder layer ran, CPU seconds)."""
    runs: list[int] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
        for layer in model.model.layers
    ]
    started = time.thread_time()
    result = work()
    seconds = time.thread_time() - started
    for hook in hooks:
        hook.remove()
    return result, len(runs), seconds


def main() -> int:
    """Run both; 1 where the choices differ or too many decoder layers ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (default 28)")
    parser.add_argument("--choose", type=int, default=9, help="layers to choose (default 9)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = random_model(options.layers)
    batches = calibration(model, length=32)
    statistics = collect_statistics(model, batches)
    with torch.inference_mode():
        ours(model, batches, statistics, 1)
        found, runs, seconds = counted(
            model, lambda: ours(model, batches, statistics, options.choose)
        )
        expected, brute_runs, brute_seconds = counted(
            model, lambda: brute_force(model, batches, statistics, options.choose)
        )
    share, same = runs / brute_runs, found == expected
    print(
        f"layer search, {options.choose} of {len(statistics)} MoE layers, choices: {list(found)} "
        f"against {list(expected)} by brute force: {'PASS' if same else 'FAIL'}"
    )
    print(
        f"layer search, decoder layers run: {share:.0%} of brute force ({runs} against "
        f"{brute_runs}; {brute_seconds / seconds:.1f}x faster: {seconds:.1f} s against "
        f"{brute_seconds:.1f} s CPU), limit {MOST_EVALUATIONS:.0%}: "
        f"{'PASS' if share <= MOST_EVALUATIONS else 'FAIL'}"
    )
    return int(not same or share > MOST_EVALUATIONS)


if __name__ == "__main__":
    sys.exit(main())
