"""How many hidden units each expert of a layer has, where these are not all the same.

In memory all experts of a layer are as wide as its widest one: those with fewer have zeros behind
them, which compute nothing. How many are theirs is noted on the module. In the files they have
their own sizes (`uneven.py`). Letters: E experts, W hidden units in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab.models.experts import Experts
from moe_lab.models.hidden_units import HiddenUnits

NOTE = "uneven_widths"


def set_widths(experts: Experts, widths: Sequence[int]) -> None:
    """Note how many hidden units each expert has, where these are not all the same."""
    vars(experts).pop(NOTE, None)
    if len(set(widths)) > 1:
        vars(experts)[NOTE] = tuple(widths)


def widths_of(experts: Experts) -> tuple[int, ...]:
    """How many hidden units each expert has: those behind are zeros."""
    even = (HiddenUnits(experts).width,) * len(experts.down_proj)
    uneven: tuple[int, ...] = vars(experts).get(NOTE, even)
    return uneven


def is_uneven(module: nn.Module) -> bool:
    """Whether a module holds experts of which some have fewer hidden units than others."""
    return NOTE in vars(module)


def first_units(widths: Sequence[int], most: int) -> Tensor:
    """The first widths[e] units of each expert [E, most], -1 behind them."""
    unit_W = torch.arange(most, device="cpu")
    return torch.stack([unit_W.masked_fill(unit_W >= width, -1) for width in widths])


@torch.no_grad()
def fill_up(experts: Experts, width: int) -> None:
    """Make all experts so wide, with zeros behind what they have, in place."""
    units = HiddenUnits(experts)
    units.keep(first_units((units.width,) * len(experts.down_proj), width))
    set_widths(experts, ())


@torch.no_grad()
def keep_widths(experts: Experts, before: Sequence[int], kept: Sequence[int]) -> None:
    """Note the widths of the experts `kept`, which alone are left, and drop what is zeros in all.

    before: the widths of all that were there.
    """
    widths = [before[expert] for expert in kept]
    most = max(1, *widths)
    if most < HiddenUnits(experts).width:
        HiddenUnits(experts).keep(torch.arange(most, device="cpu").expand(len(widths), most))
    set_widths(experts, widths)


def num_zeros(module: nn.Module) -> tuple[int, int]:
    """Of all experts inside a module: how many parameters are zeros behind the narrow ones; bytes.

    No file holds them.
    """
    number = size = 0
    for part in module.modules():
        if not is_uneven(part):
            continue
        experts: Experts = part  # type: ignore[assignment]  # noted on nothing else
        units, widths = HiddenUnits(experts), widths_of(experts)
        missing = sum(units.width - width for width in widths)
        for name in units.places:
            tensor = units.tensors[name]
            zeros = tensor.numel() // (len(widths) * units.width) * missing
            number, size = number + zeros, size + zeros * tensor.element_size()
    return number, size
