"""What metric=obs costs at the size of real experts: one synthetic layer, each expert by itself.

    python experiments/bench/obs_scale.py
    python experiments/bench/obs_scale.py --experts 128 --tokens 4096

By default four experts of 768 hidden units beside a hidden state of 2048, as Qwen3-30B-A3B has 128
of in each layer; what 128 of them, and 48 such layers, would take is extrapolated: each expert is a
problem of its own, so that time is proportional to their number. CPU time of one thread; memory is
of the process, at its highest. The forward passes that give the hidden units are not in it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from moe_lab.methods.metrics.obs import refit_of, scores_of
from moe_lab.profile.grams import GramCost, add_by_expert
from moe_lab.progress import duration
from moe_lab.types import LayerInfo, Routing

Value = TypeVar("Value")
WHOLE, LAYERS = 128, 48


def main(arguments: Sequence[str]) -> int:
    """Measure, print, extrapolate."""
    asked = parsed(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    routing, columns_EID = synthetic(asked.experts, asked.width, asked.hidden, asked.tokens)
    before = peak_gib()
    seconds: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Value]) -> Value:
        started = time.thread_time()
        value = work()
        seconds[what] = time.thread_time() - started
        return value

    weight_T = torch.ones(len(routing.x_TD))
    gram = torch.zeros(asked.experts, asked.width, asked.width, dtype=torch.float64)
    timed("Gram matrices", lambda: add_by_expert(gram, routing, weight_T))
    score_EI = timed("order of all units", lambda: scores_of(gram, columns_EID, 0.1, evenly=True))
    half_EI = score_EI >= score_EI.median(dim=1, keepdim=True).values
    new_EDW = timed("refit of half", lambda: refit_of(gram, columns_EID, half_EI, 0.1))
    assert bool(new_EDW.isfinite().all())
    tell(asked, seconds, peak_gib() - before)
    return 0


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--width", type=int, default=768, help="hidden units of each expert")
    parser.add_argument("--hidden", type=int, default=2048, help="size of the hidden state")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each expert")
    return parser.parse_args(arguments)


def synthetic(experts: int, width: int, hidden: int, tokens: int) -> tuple[Routing, torch.Tensor]:
    """Hidden units that have something to do with each other, and columns [E, I, D]."""
    h_SI = torch.randn(experts * tokens, width) @ (
        torch.randn(width, width) / width**0.5 + torch.eye(width)
    )
    number = torch.arange(experts * tokens)
    x_TD, weight_S, expert_S = (
        torch.empty(len(number), 0),
        torch.rand(len(number)),
        number // tokens,
    )
    routing = Routing(
        x_TD, x_TD, expert_S[:, None], weight_S[:, None], x_TD, expert_S, number, weight_S,
        hidden_SI=h_SI,
    )  # fmt: skip
    return routing, torch.randn(experts, width, hidden) / hidden**0.5


def tell(asked: argparse.Namespace, seconds: dict[str, float], gib: float) -> None:
    """One line for each step, measured and extrapolated."""
    print(
        f"{asked.experts} experts x {asked.width} hidden units, hidden size {asked.hidden}, "
        f"{asked.tokens} tokens each; CPU time of one thread"
    )
    for what, taken in {**seconds, "all": sum(seconds.values())}.items():
        whole = taken * WHOLE / asked.experts
        print(
            f"{what:20} {duration(taken):>12}   {WHOLE} experts: {duration(whole):>12}, "
            f"{LAYERS} layers: {duration(whole * LAYERS):>12}"
        )
    info = LayerInfo(
        0, "", num_experts=WHOLE, top_k=8, hidden_size=asked.hidden, expert_width=asked.width
    )
    cost = GramCost(info, joint=False)
    print(
        f"memory: {gib:.2f} GiB here beside the input; {WHOLE} experts: "
        f"{cost.working_bytes / 2**30:.2f} GiB for matrices (as metric=obs says before), "
        f"{cost.stored_bytes / 2**30:.2f} GiB a layer in the store"
    )
    if asked.experts < WHOLE:
        print("extrapolated in proportion to the number of experts, not measured")


def peak_gib() -> float:
    """The most memory that the process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
