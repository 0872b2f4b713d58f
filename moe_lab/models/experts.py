"""The experts module that families share: its parameters, and what one expert computes.

Letters: see `types.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Experts(nn.Module):
    """What the experts modules of all families have in common: for annotations, never made.

    down_proj: [E, D, I], or [E, I, D] where transposed; gate_up_proj where it has a gate, up_proj
    where it has none.
    """

    config: Any  # differs by family
    num_experts: int
    gate_up_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    forward: Callable[..., Tensor]
    _apply_gate: Callable[..., Tensor]
    _is_expert_parallel: bool


class OneExpert(Experts):
    """Mixed into a family's experts module that has one expert left, for every token alike.

    Whatever the router says is ignored: the layer is condensed, and constant gates are folded into
    the expert's weights. num_routed: how many experts there were, which what is kept of the block
    may still have rows for.
    """

    num_routed: int

    def forward(self, hidden_states: Tensor, *routed: Tensor, **named: Tensor) -> Tensor:
        """The output [T, D] of the one expert."""
        return expert_forward(self, expert_parameters(self)[0], hidden_states)


def scales_input(experts: Experts) -> bool:
    """Whether the router's weights multiply what an expert gets, as in Llama 4."""
    return bool(getattr(experts, "scales_input", False))


def rows_of_each(expert_S: Tensor, number: int) -> Tensor:
    """How many of these rows each of so many experts has [E]; an index behind the last is nobody's.

    Not by `bincount`, for which a GPU has to be waited for.
    """
    count_E = expert_S.new_zeros(number + 1)
    ones_S = expert_S.new_ones(len(expert_S))
    return count_E.scatter_add_(0, expert_S.clamp(max=number), ones_S)[:number]


def expert_parameters(experts: Experts) -> list[dict[str, Tensor]]:
    """Each existing expert's own weights: a dictionary of slices per expert, without copying."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = {"up": up, "down": "down_proj"}
    if experts.has_bias:
        names |= {"up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}
    number = len(experts.down_proj)  # zero experts may have rows behind these
    slices = {key: getattr(experts, name)[:number].unbind(0) for key, name in names.items()}
    return [dict(zip(slices, row, strict=True)) for row in zip(*slices.values(), strict=True)]


def expert_forward(experts: Experts, parameters: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """The output [T, D] of one expert, before any router weight."""
    return expert_output(experts, parameters, expert_hidden(experts, parameters, x_TD))


def expert_output(experts: Experts, parameters: dict[str, Tensor], h_TI: Tensor) -> Tensor:
    """The same [T, D] from what its hidden units compute."""
    y = _linear(h_TI, parameters["down"], parameters.get("down_bias"), experts.is_transposed)
    return experts.post_expert_norm(y) if experts.has_post_expert_norm else y


def expert_hidden(experts: Experts, parameters: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """What the hidden units of one expert compute [T, I]: the input of its down projection."""
    h = _linear(x_TD, parameters["up"], parameters.get("up_bias"), experts.is_transposed)
    return experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias
