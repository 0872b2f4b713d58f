"""MTP layers beside narrower experts: theirs keep the hidden units with the longest weights.

A family's config has one width for the experts of all its layers, the MTP layers' among them. No
statistics are known of these (`mtp.py`), so that the norm of all weights of a hidden unit decides.
Letters: I hidden units, W of them that stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lab.models.layers import SHARED_NAMES, moe_layers
from moe_lab.models.mtp import EXPERT, MtpLayers
from moe_lab.types import MtpName, UserError

DOWN = ("down_proj", "w2")  # what a projection is called that has a column for each hidden unit
_SHARED = re.compile(rf"^(?P<block>.+)\.(?:{'|'.join(SHARED_NAMES)})\.(?P<rest>.+)$")
OF_SHARED = "shared"
Owner = tuple[str, int | str]  # a block's path; the number of an expert, or OF_SHARED
Read = Callable[[str], Tensor]  # a tensor of the MTP layers by its name


@dataclass(frozen=True)
class Narrowed:
    """From how many hidden units to how many the experts of MTP layers go, and the shared ones."""

    experts: tuple[int, int] | None = None
    shared: tuple[int, int] | None = None

    def __bool__(self) -> bool:
        return bool(self.experts or self.shared)

    def of(self, owner: Owner) -> tuple[int, int]:
        """Those of an expert, or of the shared ones."""
        pair = self.shared if owner[1] == OF_SHARED else self.experts
        assert pair is not None
        return pair


@dataclass(frozen=True)
class Units:
    """Where a tensor of the MTP layers has hidden units.

    owner: of which expert, or of the shared ones; None: a row for each expert. axis: of one
    expert's tensor; both: whether it holds the gate and the up projection together.
    """

    block: str
    owner: int | str | None
    axis: int
    both: bool


def units_left(
    mtp: MtpLayers, before: PreTrainedModel, after: PreTrainedModel, stock: bool, how: MtpName
) -> Narrowed:
    """How the MTP layers' experts get narrower, as the config of the model `after` has them.

    before, after: the model at the source and the one that is saved. In our own form the config
    has the widths of the source, and they stay. UserError for `keep` where they cannot.
    """
    if how == "drop" or not stock or not mtp.num_experts:
        return Narrowed()
    one, other = (next((layer.info for layer in moe_layers(m)), None) for m in (before, after))
    if one is None or other is None:
        return Narrowed()
    experts, shared = (
        (getattr(one, name), getattr(other, name)) for name in ("expert_width", "shared_width")
    )
    left = Narrowed(*(pair if pair[0] != pair[1] else None for pair in (experts, shared)))
    if left and how == "keep":
        (old, new), what = (experts, "experts") if left.experts else (shared, "shared experts")
        raise UserError(
            f"method.mtp=keep would leave the MTP layers' {what} {old} hidden units wide while "
            f"those of all other layers have {new}: the family's config has one width for all, so "
            "that no engine could load the result. method.mtp=prune narrows them, too (with "
            "method.mtp=drop they go)"
        )
    return left


def units_of(mtp: MtpLayers, name: str, left: Narrowed) -> Units | None:
    """Where a tensor has hidden units that may go; None where it has none."""
    expert, shared = EXPERT.match(name), _SHARED.match(name)
    if expert and expert["block"] in mtp.num_experts and left.experts:
        number, width = expert["number"], left.experts[0]
        shape = mtp.shapes[name][0 if number else 1 :]
        found = _axis(shape, expert["rest"], width)
        return found and Units(expert["block"], int(number) if number else None, *found)
    if shared and shared["block"] in mtp.num_experts and left.shared:
        found = _axis(mtp.shapes[name], shared["rest"], left.shared[0])
        return found and Units(shared["block"], OF_SHARED, *found)
    return None


def _axis(shape: tuple[int, ...], rest: str, width: int) -> tuple[int, bool] | None:
    """In which dimension of an expert's tensor hidden units lie; both: of gate and up together."""
    part = rest.split(".")[0].removesuffix("_bias")
    down, both = part in DOWN, "gate_up" in part
    axes = [axis for axis, size in enumerate(shape) if size == width * (2 if both else 1)]
    if not axes or (down and len(shape) == 1):
        return None
    return axes[-1 if down else 0], both


def kept_units(mtp: MtpLayers, left: Narrowed, read: Read) -> dict[Owner, Tensor]:
    """The hidden units [W] that stay of each expert of each block, and of its shared ones.

    Ascending. UserError where a block's tensors do not say where they are.
    """
    squares: dict[Owner, Tensor] = {}
    for name in mtp.shapes:
        where = units_of(mtp, name, left)
        if where is None:
            continue
        for owner, part in _parts(where, read(name)):
            square = _squares(where, part)
            squares[owner] = squares[owner] + square if owner in squares else square
    found = {block for block, owner in squares if owner != OF_SHARED}
    if left.experts and (unknown := sorted(mtp.num_experts.keys() - found)):
        raise UserError(
            f"{unknown[0]}: it is not known where the hidden units of the MTP layer's experts lie, "
            "so that they cannot become narrower; method.mtp=drop leaves the MTP layers out"
        )
    return {
        owner: square.argsort(descending=True, stable=True)[: left.of(owner)[1]].sort().values
        for owner, square in squares.items()
    }


def _parts(where: Units, tensor: Tensor) -> list[tuple[Owner, Tensor]]:
    """One owner's tensor each."""
    if where.owner is not None:
        return [((where.block, where.owner), tensor)]
    return [((where.block, expert), part) for expert, part in enumerate(tensor)]


def _squares(where: Units, tensor: Tensor) -> Tensor:
    """The sum of squares of each hidden unit's weights [I]."""
    rows = tensor.double().movedim(where.axis, 0)
    square_N = rows.reshape(len(rows), -1).square().sum(dim=1)
    return square_N.view(2, -1).sum(dim=0) if where.both else square_N


def cut_units(
    mtp: MtpLayers, name: str, tensor: Tensor, left: Narrowed, kept: dict[Owner, Tensor]
) -> Tensor:
    """A tensor with the kept hidden units; zeros behind them where there are to be more."""
    where = units_of(mtp, name, left)
    if where is None:
        return tensor
    made = [_cut(part, where, kept[owner], left.of(owner)) for owner, part in _parts(where, tensor)]
    return made[0] if where.owner is not None else torch.stack(made)


def _cut(tensor: Tensor, where: Units, kept_W: Tensor, pair: tuple[int, int]) -> Tensor:
    before, after = pair
    place = torch.cat([kept_W, kept_W + before]) if where.both else kept_W
    cut = tensor.index_select(where.axis, place)
    if after <= before:
        return cut
    halves = cut.chunk(2 if where.both else 1, dim=where.axis)
    shape = list(halves[0].shape)
    shape[where.axis] = after - before
    zeros = tensor.new_zeros(shape)
    return torch.cat([part for half in halves for part in (half, zeros)], dim=where.axis)
