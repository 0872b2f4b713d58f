"""One MoE layer after its edits: what its hidden units compute, and what its output lacks.

Its tokens are those that it gets now, by its own routing. What it lacks is the state that should
leave the decoder layer, less the one that does: so what of the output no column decides (biases,
constants, the residual) is in neither. Letters: see `types.py`; N hidden units that are refitted
together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer
from moe_lab.models.predictions import exact
from moe_lab.models.refitting import (
    Handed,
    handing,
    no_sum,
    routed_hidden,
    shared_down,
    shared_hidden,
)
from moe_lab.models.stream import States
from moe_lab.models.widths import widths_of
from moe_lab.profile.grams import TOKENS_SIDE_BY_SIDE, weights_of_states
from moe_lab.types import NotFinite

NOTED = ("x", "place", "weight", "gate", "lacking", "weighs", "held")


class Part(NamedTuple):
    """Hidden units that are found together: of one expert, or of the shared ones (None)."""

    expert: int | None
    width: int


class Lacking(NamedTuple):
    """Some tokens: what hidden units add by column, what is missing, what tokens weigh."""

    z_TN: Tensor
    missing_TD: Tensor
    weight_T: Tensor


class EditedLayer:
    """What is needed to refit one layer, on all documents of a stream.

    layer: what stands in the stream's model now. given: the states before it; wanted: those that
    should leave it. held: the documents by which ridges are chosen. `parts` are the routed experts
    that have hidden units, then the shared ones where these are known.
    """

    def __init__(
        self,
        layer: MoELayer,
        given: States,
        wanted: States,
        token_weight: str,
        held: Collection[int],
    ):
        self.layer, self.stream = layer, given.stream
        self.parts = _parts(layer)
        self.factors = _factors(layer, given, self.parts)
        for batch in range(self.stream.num_batches):
            self._keep(batch, given, wanted, token_weight, held)

    @property
    def num_units(self) -> int:
        """Of all parts together."""
        return sum(part.width for part in self.parts)

    @torch.no_grad()
    def _keep(
        self, batch: int, given: States, wanted: States, kind: str, held: Collection[int]
    ) -> None:
        """Note of one batch what its valid tokens are, and what they lack."""
        valid = self.stream.valid[batch]
        leaving, handed = _passed(self.layer, given, batch)
        wanted_TD = wanted[batch][valid].to(leaving.device)
        lacking_TD = exact(wanted_TD) - exact(leaving[valid])
        if not bool(lacking_TD.isfinite().all()):
            index = self.layer.info.index
            raise NotFinite(f"layer {index}: the state that leaves it is not finite", index)
        flat = valid.reshape(-1)
        self._put(batch, "x", handed.x_TD[flat])
        self._put(batch, "place", handed.place_TK[flat])
        self._put(batch, "weight", handed.weight_TK[flat])
        if handed.gate_T is not None:
            self._put(batch, "gate", handed.gate_T[flat])
        self._put(batch, "lacking", lacking_TD)
        self._put(batch, "weighs", weights_of_states(wanted_TD, kind))
        self._put(batch, "held", self.stream.are_of(held, batch))

    def _put(self, batch: int, name: str, tensor: Tensor) -> None:
        self.stream.cache["edited layer", name, batch] = tensor

    def _get(self, batch: int, name: str) -> Tensor:
        return self.stream.cache["edited layer", name, batch]

    def close(self) -> None:
        """Forget what was noted."""
        for batch in range(self.stream.num_batches):
            for name in NOTED:
                self.stream.cache.pop(("edited layer", name, batch))

    def square(self) -> float:
        """The sum of what is missing, squared, each token by what it weighs."""
        batches = range(self.stream.num_batches)
        each = ((self._get(b, "lacking").double(), self._get(b, "weighs")) for b in batches)
        return sum(float((missing.square().sum(dim=1) * one).sum()) for missing, one in each)

    def rows(self, held: bool) -> Iterator[Lacking]:
        """All units side by side, on the documents that are held out, or on the others."""
        for batch in range(self.stream.num_batches):
            wanted = (self._get(batch, "held") == held).nonzero()[:, 0]
            for chosen in wanted.split(TOKENS_SIDE_BY_SIDE):
                handed = self._handed(batch, chosen)
                lacking = self._get(batch, "lacking")[chosen]
                weight = self._get(batch, "weighs")[chosen]
                yield Lacking(self._side_by_side(handed, lacking), lacking, weight)

    def _side_by_side(self, handed: Handed, like: Tensor) -> Tensor:
        z_TN = like.new_zeros(len(handed.x_TD), self.num_units)
        start = 0
        for part in self.parts:
            token_S, z_SI = self._hidden(part, handed)
            z_TN[token_S, start : start + part.width] = z_SI.to(z_TN.dtype)
            start += part.width
        return z_TN

    def rows_of(self, part: Part, columns_ND: Tensor, held: bool) -> Iterator[Lacking]:
        """The units of one part, on the tokens that get it; what it adds by `columns_ND` is missing
        as well."""
        for batch in range(self.stream.num_batches):
            chosen = (self._get(batch, "held") == held).nonzero()[:, 0]
            token_S, z_SI = self._hidden(part, self._handed(batch, chosen))
            token_S = chosen[token_S]
            missing_SD = self._get(batch, "lacking")[token_S]
            z_SI = z_SI.to(missing_SD.dtype)
            added_SD = z_SI @ columns_ND.to(missing_SD)
            yield Lacking(z_SI, missing_SD + added_SD, self._get(batch, "weighs")[token_S])

    def add(self, part: Part, columns_ND: Tensor) -> None:
        """Let a part's units add this much more: less is missing then."""
        for batch in range(self.stream.num_batches):
            lacking_TD = self._get(batch, "lacking")
            everything = torch.arange(len(lacking_TD), device=lacking_TD.device)
            token_S, z_SI = self._hidden(part, self._handed(batch, everything))
            lacking_TD[token_S] -= z_SI.to(lacking_TD.dtype) @ columns_ND.to(lacking_TD)
            self._put(batch, "lacking", lacking_TD)

    def _handed(self, batch: int, chosen: Tensor) -> Handed:
        """What some tokens of a batch were handed."""
        gated = self.layer.shared_gate is not None
        names = ("x", "place", "weight", "gate") if gated else ("x", "place", "weight")
        x_TD, place_TK, weight_TK, *gate = (self._get(batch, name)[chosen] for name in names)
        return Handed(x_TD, place_TK, weight_TK, gate[0] if gated else None)

    @torch.no_grad()
    def _hidden(self, part: Part, handed: Handed) -> tuple[Tensor, Tensor]:
        token_S, z_SI = _hidden_of(self.layer, part, handed)
        return token_S, z_SI * self.factors[part.expert is None]


def _parts(layer: MoELayer) -> list[Part]:
    parts = [Part(expert, width) for expert, width in enumerate(widths_of(layer.experts)) if width]
    shared = shared_down(layer)
    return parts if shared is None else [*parts, Part(None, shared.weight.shape[1])]


def _hidden_of(layer: MoELayer, part: Part, handed: Handed) -> tuple[Tensor, Tensor]:
    """The tokens that get a part, and what its units compute there, before any factor."""
    if part.expert is None:
        every = torch.arange(len(handed.x_TD), device=handed.x_TD.device)
        return every, shared_hidden(layer, handed)
    token_S, z_SI = routed_hidden(layer, part.expert, handed)
    return token_S, z_SI[:, : part.width]


def _passed(layer: MoELayer, given: States, batch: int) -> tuple[Tensor, Handed]:
    """What leaves the decoder layer for one batch [B, L, D], and what its parts were handed."""
    info = layer.info
    with handing(layer) as catching:
        leaving = given.stream.replay(info.index, batch, given[batch])
    handed = catching.taken()
    if leaving.numel() != handed.x_TD.numel() or leaving.shape[-1] != info.hidden_size:
        why = "around it there is not one hidden state for each token"
        raise no_sum(info.index, info.family, why)
    return leaving, handed


@torch.no_grad()
def _factors(layer: MoELayer, given: States, parts: Sequence[Part]) -> tuple[float, float]:
    """What the layer multiplies the routed and the shared sum by, found on the first batch.

    Without columns it gives less; UserError where that is no multiple of what they should add.
    """
    valid = given.stream.valid[0]
    leaving, handed = _passed(layer, given, 0)
    found = [1.0, 1.0]
    routed = [part for part in parts if part.expert is not None]
    shared = [part for part in parts if part.expert is None]
    for place, some in enumerate((routed, shared)):
        if some:
            down = _down(layer, shared=bool(place))
            whole = down.clone()
            down.zero_()
            lost = exact(leaving) - exact(_passed(layer, given, 0)[0])
            down.copy_(whole)
            expected_TD = _added(layer, some, handed)
            lost_TD = lost.reshape(expected_TD.shape)
            flat = valid.reshape(-1)
            size = float(exact(leaving)[valid].norm())
            found[place] = _multiple(layer, lost_TD[flat], expected_TD[flat], size)
    return found[0], found[1]


def _down(layer: MoELayer, shared: bool) -> Tensor:
    """The columns of the routed experts [E, I, D] or of the shared ones [D, I], to be changed."""
    if not shared:
        return HiddenUnits(layer.experts).down_columns()
    down = shared_down(layer)
    assert down is not None
    return down.weight.data


def _added(layer: MoELayer, parts: Sequence[Part], handed: Handed) -> Tensor:
    """What these parts add to each token [T, D], before any factor."""
    added_TD = exact(torch.zeros_like(handed.x_TD))
    for part in parts:
        token_S, z_SI = _hidden_of(layer, part, handed)
        if part.expert is None:
            columns_ID = _down(layer, shared=True).T
        else:
            columns_ID = _down(layer, shared=False)[part.expert, : part.width]
        added_TD.index_add_(0, token_S, z_SI.to(added_TD.dtype) @ columns_ID.to(added_TD.dtype))
    return added_TD


def _multiple(layer: MoELayer, lost_TD: Tensor, expected_TD: Tensor, size: float) -> float:
    """The factor by which what was lost is what was expected; size: of the states around it."""
    square = float(expected_TD.double().square().sum())
    if not square:
        return 1.0
    factor = float((lost_TD.double() * expected_TD.double()).sum()) / square
    rest = float((lost_TD.double() - factor * expected_TD.double()).norm())
    step = torch.finfo(layer.experts.down_proj.dtype).eps
    if rest > 1e3 * step * float(lost_TD.double().norm()) + 30 * step * size:
        name = type(layer.decoder).__name__
        why = f"{name} does more with what its hidden units add than multiply and add it"
        raise no_sum(layer.info.index, layer.info.family, why)
    return factor
