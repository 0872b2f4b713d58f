"""The greedy search for experts against a faithful brute force on the same model, in one process.

The brute force does what the method's released scripts do: for every candidate of every step the
whole model runs over the calibration set, in batches of 8, with one layer condensed. First it runs
for all layers of a small model and must choose the same experts. On a model of the shipped one's
depth it runs in full for the first and the last MoE layer (--full: for all); the other layers, each
as many forwards of the same model, are extrapolated, and the output says so.

Then the search's work is counted at the method's reference setting, DeepSeekMoE-16B: on a model of
its depth and of all its proportions, in floating point operations of its matrix products, against
those of one forward. CPU time of one thread; the pass for the gates, which both need, is in neither
time, but it is in the count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moe_lab.methods.condense.method import Condense
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile

LEAST_RATIO, MOST_FORWARDS = 100.0, 20.0
NUM_EXPERTS, NUM_ROUTED, BATCH_SIZE = 64, 6, 8
# Decoder layers and hidden size; everything else is in DeepSeekMoE-16B's proportions to the latter.
SMALL, SHIPPED_DEPTH, REFERENCE_DEPTH = (3, 64), (9, 128), (28, 64)
REFERENCE_HIDDEN, DIVERGENCE_OPERATIONS = 2048, 30  # operations per hidden dimension, generously


def random_model(num_layers: int, hidden_size: int) -> PreTrainedModel:
    """DeepSeekMoE-16B in small: a dense layer, then 64 experts, top 6, two shared ones."""
    torch.manual_seed(0)
    width = 1408 * hidden_size // REFERENCE_HIDDEN
    config = Qwen2MoeConfig(
        vocab_size=102400 * hidden_size // REFERENCE_HIDDEN,
        hidden_size=hidden_size,
        intermediate_size=10944 * hidden_size // REFERENCE_HIDDEN,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_ROUTED,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=2 * width,
        mlp_only_layers=[0],
    )
    model = Qwen2MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def calibration(
    model: PreTrainedModel, length: int, padding: bool = True
) -> list[dict[str, Tensor]]:
    """One batch of random documents, by default of different lengths and padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (BATCH_SIZE, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(BATCH_SIZE if padding else 0):
        mask[row, length - 2 * row :] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


class Sum(nn.Module):
    """A condensed layer as the sum that it stands for: one expert after the other."""

    def __init__(self, block: nn.Module, gates: dict[int, float], shared_gate: float):
        super().__init__()
        self.block, self.gates, self.shared_gate = block, gates, shared_gate

    def forward(self, x: Tensor) -> Tensor:
        output = self.shared_gate * self.block.shared_expert(x)
        for expert, weight in self.gates.items():
            gate, up = F.linear(x, self.block.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.block.experts.down_proj[expert])
            output = output + weight * y
        return output


@contextmanager
def condensed(model: PreTrainedModel, index: int, block: nn.Module) -> Iterator[None]:
    """Put a block in the place of a decoder layer's MoE block for a while."""
    layer = model.model.layers[index]
    previous, layer.mlp = layer.mlp, block
    try:
        yield
    finally:
        layer.mlp = previous


def js(u_logits: Tensor, v_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence per token as the released scripts compute it."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        p, q = p + 1e-10, q + 1e-10
        return (p * (p / q).log()).sum(dim=-1)

    u, v = u_logits.float().softmax(dim=-1), v_logits.float().softmax(dim=-1)
    m = (u + v) / 2
    return (kl(u, m) + kl(v, m)) / 2


def states_after(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], index: int
) -> list[Tensor]:
    """Per document the output [tokens, D] of a decoder layer, by forwards of the whole model."""
    documents = []
    for batch in batches:
        states = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        documents += [row[:length] for row, length in zip(states[index + 1], lengths, strict=True)]
    return documents


def brute_force(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], statistics: LayerStatistics
) -> tuple[int, ...]:
    """The experts of one layer in order of choice, with a forward of the whole model for each."""
    index = statistics.info.index
    gates = statistics.mean("gate_sum").tolist()
    shared = float(statistics["shared_gate_sum"] / statistics["tokens"])
    block, intact = model.model.layers[index].mlp, states_after(model, batches, index)
    chosen: list[int] = []
    for _ in range(NUM_ROUTED):
        values = {}
        for expert in range(NUM_EXPERTS):
            if expert in chosen or gates[expert] == 0:
                continue
            weights = {one: gates[one] for one in (*chosen, expert)}
            with condensed(model, index, Sum(block, weights, shared)):
                found = states_after(model, batches, index)
            means = [js(u, v).mean() for u, v in zip(intact, found, strict=True)]
            values[expert] = float(torch.stack(means).mean())
        chosen.append(min(values, key=values.__getitem__))
    return tuple(chosen)


def ours(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], statistics: list[LayerStatistics]
) -> dict[int, tuple[int, ...]]:
    """The experts of every MoE layer by the library's search."""
    layers = [one.info.index for one in statistics]
    method = Condense(1, NUM_ROUTED, "greedy_js", layers)
    plan = method.plan(Profile(statistics, lambda: LayerStream(model, batches)))
    return {edit.index: edit.experts for edit in plan.edited()}


def same_choices(num_layers: int, hidden_size: int) -> bool:
    """Whether both choose the same experts for every layer."""
    model = random_model(num_layers, hidden_size)
    batches = calibration(model, length=48)
    statistics = collect_statistics(model, batches)
    found = ours(model, batches, statistics)
    expected = {one.info.index: brute_force(model, batches, one) for one in statistics}
    print(
        f"expert search, choices: {sum(found[i] == expected[i] for i in expected)} of "
        f"{len(expected)} layers as by brute force, with {NUM_EXPERTS} experts of which "
        f"{NUM_ROUTED} are chosen: {'PASS' if found == expected else 'FAIL'}",
        flush=True,
    )
    return found == expected


def fast_enough(num_layers: int, hidden_size: int, full: bool) -> bool:
    """Whether the search is so many times faster, and chooses the same where both ran."""
    model = random_model(num_layers, hidden_size)
    batches = calibration(model, length=64)
    statistics = collect_statistics(model, batches)
    ours(model, batches, statistics)
    started = time.thread_time()
    found = ours(model, batches, statistics)
    our_seconds = time.thread_time() - started
    measured = statistics if full else [statistics[0], statistics[-1]]
    started = time.thread_time()
    expected = {one.info.index: brute_force(model, batches, one) for one in measured}
    brute_seconds = (time.thread_time() - started) * len(statistics) / len(measured)
    ratio, same = brute_seconds / our_seconds, all(found[i] == expected[i] for i in expected)
    passed = same and ratio >= LEAST_RATIO
    how = f"measured on {len(measured)} layers, the others extrapolated"
    print(
        f"expert search, {len(statistics)} MoE layers of {NUM_EXPERTS} experts: {ratio:.0f}x "
        f"faster than brute force ({our_seconds:.1f} s against {brute_seconds:.0f} s CPU, "
        f"{how if not full else 'all measured'}), choices {'the same' if same else 'DIFFERENT'} "
        f"on {len(measured)}, limit {LEAST_RATIO:.0f}x: {'PASS' if passed else 'FAIL'}",
        flush=True,
    )
    return passed


def operations(work: Callable[[], object]) -> int:
    """Floating point operations of the matrix products that `work` really does."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def little_work(num_layers: int, hidden_size: int) -> bool:
    """Whether the search costs at most so many forwards of a model of the reference's shape."""
    model = random_model(num_layers, hidden_size)
    model.set_experts_implementation("eager")  # whose products the counter sees one by one
    batches = calibration(model, length=24, padding=False)
    statistics = collect_statistics(model, batches)
    forward = operations(lambda: [model(**batch, use_cache=False) for batch in batches])
    gates = operations(lambda: collect_statistics(model, batches)) / forward
    search = operations(lambda: ours(model, batches, statistics)) / forward
    candidates = sum(NUM_EXPERTS - step for step in range(NUM_ROUTED)) * len(statistics)
    # Divergences are no matrix products: their operations are counted, at the reference's size.
    tokens = sum(batch["attention_mask"].numel() for batch in batches)
    scale = (REFERENCE_HIDDEN / hidden_size) ** 2
    elementwise = candidates * tokens * REFERENCE_HIDDEN * DIVERGENCE_OPERATIONS / (forward * scale)
    total = gates + search + elementwise
    print(
        f"expert search, work at {NUM_EXPERTS} experts, {NUM_ROUTED} chosen, {len(statistics)} MoE "
        f"layers: {total:.1f} forwards of the whole model (gates {gates:.1f}, experts and layers "
        f"{search:.1f}, divergences {elementwise:.1f}) against {candidates}, limit "
        f"{MOST_FORWARDS:.0f}: {'PASS' if total <= MOST_FORWARDS else 'FAIL'}",
        flush=True,
    )
    return total <= MOST_FORWARDS


def main() -> int:
    """Compare and count; 1 where a figure misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="brute force for every layer")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    with torch.inference_mode():
        passed = [
            same_choices(*SMALL),
            little_work(*REFERENCE_DEPTH),
            fast_enough(*SHIPPED_DEPTH, full),
        ]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
