"""An experts module of which some experts are gone, while the router still has all its rows.

A row without an expert of its own leads to a stand-in, which computes next to nothing, or to an
expert that other rows lead to as well. Letters: R stand-ins; see `types.py` for the others, where
E counts the router's rows here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from moe_lab.models.experts import Experts, scales_input
from moe_lab.types import UserError

OF_REMAPPING = ("place_E", "constants")  # the names of the tensors that `remap` adds
# Their eager loops have no place for an index that is no expert's; all other families' skip it.
WITHOUT_SENTINEL = ("GptOssExperts", "OpenAIPrivacyFilterExperts", "DbrxExperts", "JetMoeExperts")


class RemappedExperts(Experts):
    """Mixed into a family's experts module by `remap`; what it is called with are router rows.

    place_E: for each row the position of its expert; num_experts + r for stand-in r. stand_in:
    what all of them are, None where each row leads to an expert. constants: [R, D], of stand-ins
    that are constants. routed_to: while it computes, the rows [T, K] that it was called with.
    """

    place_E: Tensor
    stand_in: str | None
    constants: Tensor | None
    routed_to: Tensor | None = None

    def forward(self, hidden_states: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """sum_k weight_k * f_k(x), f_k an expert or a stand-in."""
        place_TK = self.place_E[row_TK]
        self.routed_to = row_TK
        try:
            if self.stand_in is None:
                return super().forward(hidden_states, place_TK, weight_TK)
            out = super().forward(hidden_states, *self._of_experts(place_TK, weight_TK))
        finally:
            self.routed_to = None
        return self.with_stand_ins(out, hidden_states, place_TK, weight_TK)

    def _of_experts(self, place_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and weights for the family's own code, which leaves out what is no expert's."""
        eager = self.config._experts_implementation == "eager"
        if eager and any(kind.__name__ in WITHOUT_SENTINEL for kind in type(self).__mro__):
            gone = place_TK >= self.num_experts
            return place_TK.masked_fill(gone, 0), weight_TK.masked_fill(gone, 0.0)
        return place_TK.clamp(max=self.num_experts), weight_TK

    def with_stand_ins(
        self, out_TD: Tensor, x_TD: Tensor, place_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        """The experts' weighted sum, and what the stand-ins add to it."""
        weight_TK = weight_TK.to(torch.promote_types(weight_TK.dtype, x_TD.dtype))
        if self.constants is not None:
            number = self.num_experts + len(self.constants)
            weight_TE = weight_TK.new_zeros(len(weight_TK), number).scatter(1, place_TK, weight_TK)
            added_TD = weight_TE[:, self.num_experts :] @ self.constants.to(weight_TK.dtype)
        elif self.stand_in == "copy":
            weight_TK = weight_TK.masked_fill(place_TK < self.num_experts, 0.0)
            added_TD = weight_TK.sum(dim=1, keepdim=True) * x_TD
        else:
            return out_TD
        return out_TD + added_TD.to(out_TD.dtype)

    def stand_in_outputs(self, x_SD: Tensor, place_S: Tensor) -> Tensor:
        """What the stand-ins at `place_S` make of x_SD, before any weight: [S, D]."""
        if self.constants is not None:
            return self.constants.to(x_SD.dtype)[place_S - self.num_experts]
        return x_SD if self.stand_in == "copy" else torch.zeros_like(x_SD)


def remap(
    experts: Experts,
    places: Sequence[int],
    stand_in: str | None = None,
    constants_RD: Tensor | None = None,
) -> None:
    """Give an experts module, which holds only the experts that exist, its router's rows, in place.

    places: for each row its expert's position, or num_experts + r for stand-in r.
    """
    if scales_input(experts) or getattr(experts, "zero_experts", 0) > 0:
        raise UserError(
            "the router rows of removed experts cannot stay in this family, whose router's weights "
            "or own rows do something else; ask for method.replacement=nothing (a merge: for "
            "method.router=dominant)"
        )
    kind = type(experts)
    experts.__class__ = _placed(kind)  # type: ignore[arg-type]  # mypy: a class cannot be hashed
    placed = cast(RemappedExperts, experts)
    device = placed.down_proj.device
    placed.register_buffer("place_E", torch.tensor(list(places), device=device))
    placed.stand_in = stand_in
    placed.constants = None
    if constants_RD is not None:
        placed.constants = nn.Parameter(constants_RD, placed.down_proj.requires_grad)
    if stand_in is not None:
        # transformers' own switch: an index of num_experts is nobody's, and costs no product.
        placed._is_expert_parallel = True


def by_row(experts: Experts, values_E: Tensor) -> Tensor:
    """Values of the experts that exist as those of the router's rows; 0 for stand-ins."""
    if not isinstance(experts, RemappedExperts):
        return values_E
    values_E = torch.cat([values_E, values_E.new_zeros(1)])
    return values_E[experts.place_E.clamp(max=experts.num_experts)]


def stand_in_rows(experts: Experts) -> Tensor:
    """Which router rows [E] lead to stand-ins, bool on the CPU."""
    if isinstance(experts, RemappedExperts):
        return experts.place_E.cpu() >= experts.num_experts
    return torch.zeros(experts.num_experts, dtype=torch.bool)


@contextmanager
def all_to_experts(model: nn.Module) -> Iterator[None]:
    """While open, all router rows lead to experts, and none to a stand-in: to count products."""
    every = [
        module
        for module in model.modules()
        if isinstance(module, RemappedExperts) and module.stand_in
    ]
    places = [experts.place_E for experts in every]
    for experts in every:
        experts.place_E = torch.arange(len(experts.place_E), device=experts.place_E.device)
        experts.place_E %= experts.num_experts
    try:
        yield
    finally:
        for experts, place_E in zip(every, places, strict=True):
            experts.place_E = place_E


@functools.cache
def _placed(kind: type[Experts]) -> type[RemappedExperts]:
    return type(f"Remapped{kind.__name__}", (RemappedExperts, kind), {"__module__": __name__})


def places_of(kept: Sequence[int], num_rows: int) -> list[int]:
    """The places where kept[i] is the expert at i, and stand-ins take those of all others."""
    position = {expert: i for i, expert in enumerate(kept)}
    gone = (row for row in range(num_rows) if row not in position)
    position |= {row: len(kept) + r for r, row in enumerate(gone)}
    return [position[row] for row in range(num_rows)]


def shared_places(groups: Sequence[Sequence[int]], num_rows: int) -> list[int]:
    """The places where all rows of groups[i] lead to the expert at i."""
    position = {expert: i for i, group in enumerate(groups) for expert in group}
    return [position[row] for row in range(num_rows)]
