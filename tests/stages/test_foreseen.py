"""What a plan leaves, before any work, against what it left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Job

from moe_lab.forecast.work import Search
from moe_lab.methods.condense.method import Condense
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.methods.none import Nothing
from moe_lab.methods.skip import Skip
from moe_lab.models.checkpoint import resolve
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.stages.foreseen import dense_weights, foreseen, search_of


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=prune", "metric=frequency", "ratio.ratio=0.5"),
        ("method=prune", "metric=frequency", "ratio=global", "ratio.ratio=0.3"),
        ("method=merge", "ratio.ratio=0.5"),
        ("method=condense", "condense.layers=[1,2]", "condense.experts=[0,3]"),
        ("method=drop_layers", "condense.num_layers=1"),
    ],
    ids=lambda one: " ".join(one),
)
def test_sizes_are_those_that_are_written(
    overrides: tuple[str, ...], job: Job, checkpoint: Path
) -> None:
    foretold = job("dry_run=true", *overrides)
    assert foretold.code == 0, foretold.text
    told = foretold_of(foretold.text)
    done = job(*overrides)
    written = size_in_bytes(Path(done.report["compressed/checkpoint"])) / 2**30
    assert told["result/exact"] == ("ratio=global" not in overrides)
    # Headers count in a model of 0.2 MB.
    assert told["result/gib"] == pytest.approx(written, rel=0.015 if told["result/exact"] else 0.03)
    assert told.get("result/stock") == (
        done.report["compressed/stock"] if told["result/exact"] else None
    )


def foretold_of(text: str) -> dict:
    place = text.rpartition("dry run: ")[2].split("\n")[0].strip()
    return json.loads(Path(place).read_text())


def test_nothing_is_left_as_it_is(checkpoint: Path) -> None:
    one = resolve(checkpoint)
    layers = one.layers()
    dense = dense_weights(one, layers)
    assert dense.file_bytes == size_in_bytes(checkpoint)
    assert foreseen(one, Nothing(), layers, dense).weights is None


def test_what_a_search_asks(checkpoint: Path) -> None:
    layers = resolve(checkpoint).layers()
    assert search_of(DropLayers(1), layers) == Search()
    named = Condense(1, 2, layers=[2], experts=[0, 1])
    assert search_of(named, layers) == Search()
    experts = Condense(1, 2, layers=[2], experts="greedy_js")
    assert search_of(experts, layers) == Search(2.0, 8 + 7, True, True)
    # Of 4 decoder layers the last 3 are candidates: from these 3, 2 and 1 are computed.
    both = Condense(1, 2, layers="greedy_js", experts="greedy_js")
    assert search_of(both, layers) == Search(2.0 + (3 + 2 + 1) / 4 + 1, 3 * (8 + 7), True, True)
    assert not search_of(Condense(1, 2, refit="down_proj"), layers).known
    lexi = {"rule": "lexi", "average_top_k": 1.5}
    assert search_of(Skip(**lexi), layers) == search_of(Skip("listed", top_k=1), layers) == Search()
    assert search_of(Skip(**lexi, inputs="text"), layers).passes == 1 + (layers[0].top_k + 1) / 2
    assert search_of(Skip("naee"), layers) == Search(1.0)
