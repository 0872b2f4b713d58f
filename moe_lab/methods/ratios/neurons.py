"""What a ratio distributes where hidden units go, and not experts.

A ratio says how many items of each layer stay, best first. Of experts an item is one of them; here
it is a hidden unit of every expert of the layer (by_layer: the r-th best of each together, so that
all stay equally wide), or one hidden unit of one expert (by_expert). A ratio needs to know no more
of it than `LayerInfo` says, in which such a layer is written: `num_experts` counts items, and the
sizes are those of an item.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_lab.profile.hidden import digest_of
from moe_lab.types import LayerInfo


@dataclass(frozen=True)
class Neurons(LayerInfo):
    """A layer as a ratio sees it where hidden units go.

    place_EI: for each hidden unit of each expert how many stay before it: it is among n items where
    its place is below n. shared_place_I: the same of the shared experts', where these are narrowed,
    too. each: of how many experts an item has a hidden unit. experts: how many there are.
    """

    each: int = 1
    experts: int = 1
    place_EI: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)
    shared_place_I: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def items(self) -> str:
        """What messages call the items."""
        return "hidden units of each expert" if self.each > 1 else "hidden units"

    @property
    def floors(self) -> int:
        """How many floors a layer's is: a floor is one of an expert."""
        return self.experts // self.each

    def kept(self, number: int) -> Tensor:
        """The hidden units [E, I] (bool) among so many items."""
        return self.place_EI < number

    def shared_kept(self, number: int) -> Tensor | None:
        """The same of the shared experts [I]."""
        return None if self.shared_place_I is None else self.shared_place_I < number

    def known_by(self) -> str:
        """What the order of the items is known by in an identity."""
        return digest_of(self.place_EI, self.shared_place_I)


Ranked = tuple[Neurons, Tensor]  # a layer, and a score for each of its items


def ranked_by_layer(info: LayerInfo, score_EI: Tensor, shared_I: Tensor | None = None) -> Ranked:
    """A layer whose experts stay equally wide; scores [I], an item's being its units' mean.

    Of the shared experts, whose width may be another one, the same share stays.
    """
    place_EI = torch.stack([_places(score_I) for score_I in score_EI])
    order_EI = score_EI.argsort(dim=1, descending=True, stable=True)
    score_I = score_EI.double().gather(1, order_EI).mean(dim=0)
    shared = None if shared_I is None else _shared_places(_places(shared_I), len(score_I))
    return _neurons(info, len(score_I), len(score_EI), place_EI, shared), score_I


def ranked_by_expert(
    info: LayerInfo,
    score_EI: Tensor,
    shared_I: Tensor | None = None,
    floor: int | Tensor = 0,
    block: int = 1,
) -> Ranked:
    """A layer of which each hidden unit stays or goes by itself; scores [E * I], best first.

    The first `floor` units of each expert (or [E], each one's own) come before all others; block:
    so many units of an expert, its best first, stay or go together, ranked by their mean score.
    Ties put the lower expert first.
    """
    parts = [*score_EI.double()] + ([] if shared_I is None else [shared_I.double()])
    ranked = [_blocks(score_I, block) for score_I in parts]
    mean_N = torch.cat([mean for mean, _ in ranked])
    size_N = torch.cat([size for _, size in ranked])
    floors = torch.as_tensor(floor).expand(len(ranked))
    pairs_N = zip(ranked, floors, strict=True)
    first_N = torch.cat([torch.arange(len(mean)) * block < least for (mean, _), least in pairs_N])
    order_N = mean_N.argsort(descending=True, stable=True)
    order_N = order_N[(~first_N[order_N]).to(torch.uint8).argsort(stable=True)]
    place_N = torch.empty_like(order_N)
    place_N[order_N] = size_N[order_N].cumsum(0) - size_N[order_N]
    counts = [len(mean) for mean, _ in ranked]
    pairs = zip(parts, place_N.split(counts), strict=True)
    places = [of_block[_places(score_I) // block] for score_I, of_block in pairs]
    shared = places.pop() if shared_I is not None else None
    best_N = mean_N[order_N].repeat_interleave(size_N[order_N])
    return _neurons(info, len(best_N), 1, torch.stack(places), shared), best_N


def _blocks(score_I: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean score and size of the blocks of one expert's units, best first."""
    best_I = score_I.sort(descending=True, stable=True).values
    if block == 1:
        return best_I, torch.ones_like(best_I, dtype=torch.long)
    parts = best_I.split(block)
    return torch.stack([part.mean() for part in parts]), torch.tensor([len(one) for one in parts])


def _places(score_I: Tensor) -> Tensor:
    """How many units come before each, [I]; ties put the lower one first."""
    order_I = score_I.argsort(descending=True, stable=True)
    place_I = torch.empty_like(order_I)
    place_I[order_I] = torch.arange(len(order_I))
    return place_I


def _shared_places(place_I: Tensor, width: int) -> Tensor:
    """Before how many of `width` items each of the shared experts' hidden units stays.

    n items keep the first n / width of them, rounded up.
    """
    return (place_I * width).div(len(place_I), rounding_mode="floor")


def _neurons(
    info: LayerInfo, items: int, each: int, place_EI: Tensor, shared_place_I: Tensor | None
) -> Neurons:
    """The layer with items in the place of experts."""
    values = {one.name: getattr(info, one.name) for one in dataclasses.fields(LayerInfo)}
    of_shared = shared_place_I is not None and each > 1
    sizes = {}
    for kind in ("parameters", "bytes"):
        size = each * values[f"neuron_{kind}"]
        if of_shared:
            size += -(-values["shared_width"] * values[f"shared_neuron_{kind}"] // items)
        sizes[f"expert_{kind}"] = size
    as_items = {"num_experts": items, "top_k": 1, "groups": 1, "groups_used": 1} | sizes
    values |= as_items | {"real_experts": 0, "zero_experts": 0}
    return Neurons(
        **values, each=each, experts=info.num_experts,
        place_EI=place_EI, shared_place_I=shared_place_I,
    )  # fmt: skip


def foreseen_neurons(info: LayerInfo, widths: str, shared: bool = False) -> Neurons:
    """The same where no score is known yet: what a budget can say before any work.

    How many of the shared experts' hidden units stay by_layer is known, too, if not which.
    """
    number = info.expert_width * (1 if widths == "by_layer" else info.num_experts)
    if shared and widths == "by_expert":
        number += info.shared_width
    each = info.num_experts if widths == "by_layer" else 1
    unit_I = torch.arange(info.shared_width)
    shared_place = _shared_places(unit_I, info.expert_width) if shared else None
    return _neurons(info, number, each, torch.empty(0), shared_place)
