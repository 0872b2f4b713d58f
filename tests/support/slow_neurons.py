"""What hidden units compute, token by token and expert by expert, straight from the matrices.

But for `profile_of` no code of moe_lab: the routers are watched by hooks, all else is written out.
Softmax routers (qwen2_moe, mixtral), sigmoid ones (deepseek_v3), and experts with biases and
interleaved gates (gpt_oss).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile

NEURON_FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")


class Seen(NamedTuple):
    """One token at one expert of one layer: the router's weight, activations [I] and output [D]."""

    layer: int
    token: int
    expert: int
    weight: float
    hidden: Tensor
    output: Tensor


def block_of(decoder: Any) -> Any:
    return decoder.mlp


def is_moe(decoder: Any) -> bool:
    return hasattr(block_of(decoder), "experts")


def slow_hidden(experts: Any, expert: int, x_D: Tensor) -> Tensor:
    """The activations [I] of one expert on one token, in float64."""
    x_D, up = x_D.double(), experts.gate_up_proj[expert].detach().double()
    if hasattr(experts, "gate_up_proj_bias"):  # gpt_oss: [D, 2I], gate and up in turn
        both = x_D @ up + experts.gate_up_proj_bias[expert].detach().double()
        gate, value = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (value + 1) * gate * torch.sigmoid(1.702 * gate)
    width = up.shape[0] // 2
    rows = [float(row @ x_D) for row in up]
    gate, value = torch.tensor(rows[:width]).double(), torch.tensor(rows[width:]).double()
    return F.silu(gate) * value


def slow_columns(experts: Any, expert: int) -> Tensor:
    """The columns [I, D] of one expert's down projection, in float64."""
    down = experts.down_proj[expert].detach().double()
    return down if hasattr(experts, "down_proj_bias") else down.T


def seen_by(model: Any, batch: dict[str, Tensor]) -> Iterator[Seen]:
    """Every valid token at every expert that its router chose, layer by layer."""
    caught: dict[int, tuple[Tensor, Any]] = {}
    handles = []
    for index, decoder in enumerate(model.model.layers):
        if is_moe(decoder):
            block = block_of(decoder)
            router = getattr(block, "gate", None) or block.router

            def keep(module: Any, args: Any, output: Any, index: int = index) -> None:
                caught[index] = args[0].reshape(-1, args[0].shape[-1]), output

            handles.append(router.register_forward_hook(keep))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    valid = batch["attention_mask"].flatten().tolist()
    for index, (x_TD, (_, weight_TK, index_TK, *_)) in caught.items():
        experts = block_of(model.model.layers[index]).experts
        for token, there in enumerate(valid):
            chosen = zip(index_TK[token].tolist(), weight_TK[token].tolist(), strict=True)
            for expert, weight in chosen if there else ():
                hidden = slow_hidden(experts, expert, x_TD[token])
                output = hidden @ slow_columns(experts, expert)
                if hasattr(experts, "down_proj_bias"):
                    output = output + experts.down_proj_bias[expert].detach().double()
                yield Seen(index, token, expert, weight, hidden, output)


def slow_sums(model: Any, batch: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The statistics of hidden units [E, I] of every MoE layer by these loops."""
    names = ("hidden_sum", "hidden_square_sum", "gate_hidden_square_sum", "hidden_max",
             "gate_hidden_max")  # fmt: skip
    sums: dict[int, dict[str, Tensor]] = {}
    for index, decoder in enumerate(model.model.layers):
        if is_moe(decoder):
            experts = block_of(decoder).experts
            shape = len(experts.down_proj), len(slow_columns(experts, 0))
            sums[index] = {name: torch.zeros(shape, dtype=torch.float64) for name in names}
    for one in seen_by(model, batch):
        found, gated = sums[one.layer], one.weight * one.hidden
        found["hidden_sum"][one.expert] += one.hidden
        found["hidden_square_sum"][one.expert] += one.hidden**2
        found["gate_hidden_square_sum"][one.expert] += gated**2
        for name, values in (("hidden_max", one.hidden), ("gate_hidden_max", gated)):
            found[name][one.expert] = torch.maximum(found[name][one.expert], values.abs())
    return sums


def profile_of(model: Any, batches: list) -> Profile:
    """Its statistics, those of hidden units too, and the model itself."""
    return Profile(
        collect_statistics(model, batches, neurons=True),
        lambda number=None: LayerStream(model, batches),
        lambda number=None: (model, batches),
    )
