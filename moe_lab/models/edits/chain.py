"""All edits of one layer, one after another: what they leave of its experts."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.models.edits.base import Edit, Fate


@dataclass(frozen=True)
class Chain:
    """The edits of one layer in order, at least one.

    Each names experts by their numbers behind those before it; here all are named by their numbers
    in the layer before any edit.
    """

    edits: tuple[Edit, ...]

    @property
    def index(self) -> int:
        """The decoder layer's."""
        return self.edits[0].index

    @property
    def changes(self) -> bool:
        """Whether anything changes."""
        return any(edit.changes for edit in self.edits)

    @property
    def leaves_moe(self) -> bool:
        """Whether an MoE layer is left."""
        return all(edit.leaves_moe for edit in self.edits)

    @property
    def drops_layer(self) -> bool:
        """Whether the layer adds nothing any more."""
        return any(edit.drops_layer for edit in self.edits)

    @property
    def removes_decoder(self) -> bool:
        """Whether the whole decoder layer goes."""
        return any(edit.removes_decoder for edit in self.edits)

    @property
    def keeps_rows(self) -> bool:
        """Whether the layer's router keeps all its rows while experts go."""
        return any(edit.keeps_rows for edit in self.edits)

    @property
    def keeps_experts_as_they_are(self) -> bool:
        """Whether the experts that stay keep all their weights."""
        return all(edit.keeps_experts_as_they_are for edit in self.edits)

    @property
    def experts_kept(self) -> tuple[int, ...] | None:
        """The experts of which something is left, in the order of their new numbers; None: all."""
        kept = None
        for edit in self.edits:
            if edit.experts_kept is not None:
                kept = edit.experts_kept if kept is None else _among(kept, edit.experts_kept)
        return kept

    @property
    def num_experts_left(self) -> int | None:
        """How many experts stay, where that is what the edits decide; None elsewhere."""
        numbers = (edit.num_experts_left for edit in reversed(self.edits))
        told = (number for number in numbers if number is not None)
        return next(told, None) if self.leaves_moe else None

    @property
    def expert_scores(self) -> tuple[float, ...]:
        """One for each expert of the layer before any edit; empty where there are none."""
        for place, edit in enumerate(self.edits):
            whole = place == 0 or Chain(self.edits[:place]).experts_kept is None
            if edit.expert_scores and whole:
                return edit.expert_scores
        return ()

    @property
    def layer_score(self) -> float | None:
        """The layer's own, as the first edit that has one says it."""
        scores = (edit.layer_score for edit in self.edits)
        return next((score for score in scores if score is not None), None)

    def fate(self, expert: int) -> Fate:
        """What becomes of an expert in the end."""
        found, kept, place = Fate("kept"), None, expert
        for number, edit in enumerate(self.edits):
            now = edit.fate(place)
            if now.state == "removed":
                into = now.into if kept is None or now.into < 0 else kept[now.into]
                return self._merged(into)
            found = now if number == 0 or now.state == "joined" else found
            if not edit.leaves_moe:
                break
            if edit.experts_kept is not None:
                kept = edit.experts_kept if kept is None else _among(kept, edit.experts_kept)
                place = edit.experts_kept.index(place)
        return found

    def width_of(self, expert: int) -> int | None:
        """How many hidden units an expert has in the end; None where no edit says."""
        if self.fate(expert).state == "removed":
            return 0 if any(edit.width_of(0) is not None for edit in self.edits) else None
        width, place = None, expert
        for edit in self.edits:
            told = edit.width_of(place)
            width = width if told is None else told
            if edit.experts_kept is not None and place in edit.experts_kept:
                place = edit.experts_kept.index(place)
        return width

    def _merged(self, into: int) -> Fate:
        """Of an expert that is gone: where it was merged into, if that one is there in the end."""
        if into >= 0 and (later := self.fate(into)).state == "removed":
            return later
        return Fate("removed", into=into)


def _among(kept: tuple[int, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `kept` at these places, as far as there are such."""
    return tuple(kept[place] for place in places if place < len(kept))
