"""New down projections for the experts of a layer, and what can be said before they are found.

A layer's experts add sum_n z_n w_n to a token: z_n what a hidden unit computes, times the router's
weight of its expert, w_n its column of the down projection. Only where that is so, but for a
factor, can columns be found by least squares. Letters: see `types.py`; N hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lab.models.experts import expert_hidden, expert_parameters, scales_input
from moe_lab.models.layers import MoELayer, has_hidden_units
from moe_lab.models.probing import adds_multiples
from moe_lab.models.remapped import RemappedExperts
from moe_lab.types import UserError


def refit_name(index: int) -> str:
    """What a plan calls the refitted down projections [E, D, I] of decoder layer `index`."""
    return f"layers.{index}.refit.down_proj"


def shared_refit_name(index: int) -> str:
    """The same [D, I] of its shared experts."""
    return f"layers.{index}.refit.shared_down_proj"


def shared_down(layer: MoELayer) -> nn.Linear | None:
    """The down projection of the shared experts; None where it is not known what these are."""
    if layer.shared is None or not layer.info.shared_width or not has_hidden_units(layer.shared):
        return None
    down = layer.shared.get_submodule("down_proj")
    return down if isinstance(down, nn.Linear) else None


def no_sum(index: int, family: str, why: str) -> UserError:
    """The refusal of a layer whose columns cannot be found by least squares."""
    return UserError(
        f"layer {index} of {family} cannot be refitted in closed form: {why}. Ask for "
        "method.refit=false (for a merge, with another grouping than mergemoe)"
    )


def check_sum(layer: MoELayer) -> None:
    """Refuse a layer that does more with its hidden units than add them up, times factors.

    The layer may be on the meta device.
    """
    info, what = layer.info, type(layer.block).__name__
    if layer.experts.has_post_expert_norm:
        raise no_sum(info.index, info.family, "each of its experts ends in a norm")
    if not adds_multiples(layer):
        raise no_sum(
            info.index, info.family, f"{what} does more with its experts' outputs than add"
        )


class Handed(NamedTuple):
    """What the parts of a layer were handed in one pass, padding and all, T = B * L.

    x_TD: the block's input; place_TK: the experts chosen, as they stand in the module, at least E
    where a choice is none of them; weight_TK: the router's weights; gate_T: of the shared experts,
    None where they have none.
    """

    x_TD: Tensor
    place_TK: Tensor
    weight_TK: Tensor
    gate_T: Tensor | None


class Catching:
    """What `handing` has seen since it was opened."""

    def __init__(self, layer: MoELayer):
        self.layer = layer
        self.arguments: list[Any] = []
        self.gate: Tensor | None = None

    def taken(self) -> Handed:
        """Of the last pass."""
        x, row, weight = self.arguments[:3]
        x_TD = x.reshape(-1, x.shape[-1])
        row_TK, weight_TK = row.reshape(len(x_TD), -1), weight.reshape(len(x_TD), -1)
        gate_T = None if self.gate is None else self.gate.reshape(-1).sigmoid()
        return Handed(x_TD, places(self.layer, row_TK), weight_TK, gate_T)


@contextmanager
def handing(layer: MoELayer) -> Iterator[Catching]:
    """While open, what the layer's experts and its shared gate are given is caught."""
    catching = Catching(layer)

    def experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        catching.arguments = [*args, *kwargs.values()]

    def gate(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        catching.gate = output

    handles = [layer.experts.register_forward_pre_hook(experts, with_kwargs=True)]
    if layer.shared_gate is not None:
        handles.append(layer.shared_gate.register_forward_hook(gate))
    try:
        yield catching
    finally:
        for handle in handles:
            handle.remove()


def places(layer: MoELayer, row_TK: Tensor) -> Tensor:
    """Where in the experts module the experts stand that router rows lead to."""
    experts = layer.experts
    return experts.place_E[row_TK] if isinstance(experts, RemappedExperts) else row_TK


def routed_hidden(layer: MoELayer, expert: int, handed: Handed) -> tuple[Tensor, Tensor]:
    """The tokens [n] that get an expert, and what its hidden units add there by column [n, I].

    That is their activations, times the router's weights of all rows that lead to the expert.
    """
    chosen_TK = handed.place_TK == expert
    token_S = chosen_TK.any(dim=1).nonzero()[:, 0]
    weight_S = (handed.weight_TK * chosen_TK)[token_S].sum(dim=1)
    x_SD, parameters = handed.x_TD[token_S], expert_parameters(layer.experts)[expert]
    if scales_input(layer.experts):
        return token_S, expert_hidden(layer.experts, parameters, x_SD * weight_S[:, None])
    exact = torch.promote_types(x_SD.dtype, torch.float32)
    h_SI = expert_hidden(layer.experts, parameters, x_SD)
    return token_S, h_SI.to(exact) * weight_S.to(exact)[:, None]


def shared_hidden(layer: MoELayer, handed: Handed) -> Tensor:
    """The same [T, I] of the shared experts, which every token gets, times their gate."""
    down = shared_down(layer)
    assert layer.shared is not None and down is not None
    caught: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        layer.shared(handed.x_TD)
    finally:
        handle.remove()
    exact = torch.promote_types(caught[0].dtype, torch.float32)
    h_TI = caught[0].to(exact)
    return h_TI if handed.gate_T is None else h_TI * handed.gate_T.to(exact)[:, None]
