"""The Hessians of a decoder layer's matrices, on the calibration tokens that each gets now."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.models.expert_matrices import own_part
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.stream import States
from moe_lab.profile.routed_tokens import RoutedTokens
from moe_lab.quantize.column_rounding import HessianSum

HESSIAN_WEIGHTS = ("none", "gate_squared")


def expert_hessians(
    tokens: RoutedTokens, expert: int, token_weight: str, least_tokens: int
) -> tuple[Tensor, Tensor] | None:
    """Of an expert's inputs [D, D], and of its hidden units [I, I], as it stands.

    None where it gets fewer than so many tokens. token_weight: none, as GPTQ has it; gate_squared,
    each token counts by the square of its router weight, as the squared error of the layer's output
    has it (MoEQuant's affinity-guided Hessian, 2505.03804, is a relative).
    """
    inputs, hidden = HessianSum(), HessianSum()
    width = own_part(tokens.layer.experts, HiddenUnits(tokens.layer.experts).down, expert).shape[1]
    for part in tokens.parts(expert):
        gate_N1 = part.gate_N[:, None] if token_weight == "gate_squared" else 1.0
        inputs.add(part.x_ND * gate_N1)
        hidden.add(tokens.hidden(expert, part)[:, :width] * gate_N1)
    if inputs.number < least_tokens:
        return None
    return inputs.value(), hidden.value()


@torch.no_grad()
def linear_hessians(
    states: States, index: int, modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Of the inputs of linear modules of decoder layer `index`, whose weights are in memory.

    Padding is left out. Modules that were given no token are not among them.
    """
    sums = {name: HessianSum() for name in modules}
    for batch, valid in enumerate(states.stream.valid):
        with ExitStack() as stack:
            for name, module in modules.items():
                hook = _adding(sums[name], valid)
                stack.enter_context(module.register_forward_pre_hook(hook))
            states.stream.replay(index, batch, states[batch])
    return {name: one.value() for name, one in sums.items() if one.number}


def _adding(total: HessianSum, valid: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        flat = valid.reshape(-1).to(x.device)
        total.add(x[flat] if len(x) == len(flat) else x)

    return hook
