"""Two edits of one layer: what becomes of each expert, by its number before any of them."""

from __future__ import annotations

import pytest
from own_edits import NarrowDense, NarrowExperts

from moe_lab.models.edits.base import Edit, Fate
from moe_lab.models.edits.chain import Chain
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.narrow import NarrowExperts as Narrowed
from moe_lab.models.edits.prune import PruneExperts

PRUNE = PruneExperts(1, "x", kept=(5, 1, 4, 2), scores=(0.1,) * 6)
MERGE = MergeExperts(1, "x", kept=(1, 3), groups=((1, 0), (3,)), scores=(0.2,) * 4)
GONE = Fate("removed")


@pytest.mark.parametrize(
    ("edits", "kept", "fates"),
    [
        ((PRUNE,), (5, 1, 4, 2), [GONE, *[Fate("kept")] * 2, GONE, *[Fate("kept")] * 2]),
        ((PRUNE, NarrowExperts(1, "x")), (5, 1, 4, 2),
         [GONE, *[Fate("kept")] * 2, GONE, *[Fate("kept")] * 2]),
        # Behind PRUNE expert 0 is 5, 1 is 1, 2 is 4, 3 is 2.
        ((PRUNE, MERGE), (1, 2),
         [GONE, Fate("joined", 2), Fate("kept"), GONE, GONE, Fate("removed", into=1)]),
        ((MERGE, PruneExperts(1, "x", kept=(1,))), (3,),
         [GONE, GONE, GONE, Fate("kept", 1)]),
        ((PRUNE, CondenseLayer(1, "x", experts=(3, 0)), NarrowDense(1, "x")), (2, 5),
         [GONE, GONE, Fate("joined", 1), GONE, GONE, Fate("joined", 2)]),
        ((PRUNE, DropLayer(1, "x")), (), [GONE] * 6),
        ((KeepLayer(1, "x"),), None, [Fate("kept")] * 6),
    ],
)  # fmt: skip
def test_the_fate_of_each_expert(
    edits: tuple[Edit, ...], kept: tuple[int, ...] | None, fates: list[Fate]
) -> None:
    chain = Chain(edits)
    assert chain.experts_kept == kept
    assert [chain.fate(expert) for expert in range(len(fates))] == fates


def test_what_a_layer_is_afterwards() -> None:
    condensed = Chain((PRUNE, CondenseLayer(1, "x", experts=(0,))))
    assert (condensed.num_experts_left, condensed.leaves_moe) == (None, False)
    twice = Chain((PRUNE, MERGE, NarrowExperts(1, "x")))
    assert (twice.index, twice.num_experts_left, twice.leaves_moe) == (1, 2, True)
    assert twice.changes and not Chain((KeepLayer(1, "x"),)).changes
    assert Chain((PRUNE, DropLayer(1, "x", scores=(0.5,)))).drops_layer


def test_scores_are_those_of_the_whole_layer() -> None:
    assert Chain((PRUNE, MERGE)).expert_scores == PRUNE.scores
    assert Chain((NarrowExperts(1, "x"), MERGE)).expert_scores == MERGE.scores
    unscored = PruneExperts(1, "x", kept=(0, 1, 2, 3))
    assert Chain((unscored, MERGE)).expert_scores == (), "its numbers are not those of the layer"
    assert Chain((PRUNE, DropLayer(1, "x", scores=(0.5,)))).layer_score == 0.5


def test_widths_are_those_of_the_experts_that_are_left() -> None:
    def told(*edits: Edit) -> list[int | None]:
        return [Chain(edits).width_of(expert) for expert in range(6)]

    assert told(PRUNE) == [None] * 6
    assert told(Narrowed(1, "x", widths=(3,))) == [3] * 6
    assert told(Narrowed(1, "x", widths=(6, 5, 4, 3, 2, 0))) == [6, 5, 4, 3, 2, 0]
    # Behind PRUNE expert 0 is 5, 1 is 1, 2 is 4, 3 is 2.
    assert told(PRUNE, Narrowed(1, "x", widths=(9, 8, 7, 6))) == [0, 8, 6, 0, 7, 9]
    assert told(Narrowed(1, "x", widths=(6, 5, 4, 3, 2, 1)), PRUNE) == [0, 5, 4, 0, 2, 1]
