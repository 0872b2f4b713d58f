"""Dropping MoE sublayers and whole decoder layers: which go, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import tiny_batch, tiny_model
from running import Outcome

from moe_lab.methods.drop_blocks import DropBlocks
from moe_lab.methods.drop_layers import DropLayers
from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import moe_layers
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

INFOS = [LayerInfo(i, f"model.layers.{i}.mlp", 8, 2, 32, num_decoders=4) for i in (1, 2, 3)]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_the_most_similar_goes_first(family: str) -> None:
    model = tiny_model(family)
    layers = moe_layers(model)
    with torch.no_grad():
        for layer, scale in zip(layers, (0.3, 0.01, 0.1, 1.0), strict=False):
            layer.experts.down_proj *= scale
            if layer.shared is not None:
                layer.shared.down_proj.weight *= scale
    statistics = collect_statistics(model, [tiny_batch()])
    indices = [layer.info.index for layer in layers]
    made = DropLayers(num_layers=2).plan(Profile(statistics))
    assert made.layer_order == (indices[1], indices[2])
    assert {edit.index for edit in made.edited()} == {indices[1], indices[2]}
    assert {edit.kind for edit in made.edited()} == {"drop_layer"}
    for edit, one in zip(made.edits, statistics, strict=True):
        assert edit.scores == (one.mean_cosine("layer"),)
    blocks = DropBlocks(num_layers=2).plan(Profile(statistics))
    similarity = {one.info.index: one.mean_cosine("block") for one in statistics}
    assert blocks.layer_order == tuple(sorted(similarity, key=lambda i: -similarity[i])[:2])
    assert {edit.kind for edit in blocks.edited()} == {"drop_block"}
    assert {edit.scores[0] for edit in blocks.edits} == set(similarity.values())


def test_named_layers_and_the_plan_on_disk(tmp_path: Path) -> None:
    statistics = collect_statistics(tiny_model("mixtral"), [tiny_batch()])
    for method in (DropLayers(1, layers=[3, 0], padding=0.5), DropBlocks(1, layers=[3, 0])):
        made = method.plan(Profile(statistics))
        assert made.layer_order == (3, 0)
        assert [edit.index for edit in made.edited()] == [0, 3]
        (tmp_path / "plan.json").write_text(made.to_text())
        assert Plan.load(tmp_path / "plan.json") == made


def test_impossible_requests_are_refused_before_any_work() -> None:
    for method in (DropLayers, DropBlocks):
        for number, words in ((0, "it must be at least 1"), (4, "the model has 3 MoE")):
            with pytest.raises(UserError, match=rf"condense.num_layers={number}: {words}"):
                method(number).check(INFOS)
        with pytest.raises(UserError, match=r"names \[0, 9\].*MoE layers are \[1, 2, 3\]"):
            method(1, layers=[0, 1, 9]).check(INFOS)
        with pytest.raises(UserError, match="each once"):
            method(1, layers=[1, 1]).check(INFOS)
        with pytest.raises(UserError, match=r"does not exist.*cosine"):
            method(1, layers="greedy").check(INFOS)
        method(3).check(INFOS)
    everything = [LayerInfo(i, "x", 8, 2, 32, num_decoders=3) for i in range(3)]
    DropLayers(3).check(everything)
    with pytest.raises(UserError, match="all 3 decoder layers"):
        DropBlocks(3).check(everything)
    with pytest.raises(UserError, match=r"condense\.padding=2: it must be from 0 to 1"):
        DropLayers(1, padding=2).check(INFOS)


@pytest.mark.parametrize("method", ["drop_layers", "drop_blocks"])
def test_a_whole_run(method: str, job: Callable[..., Outcome]) -> None:
    done = job(f"method={method}", "condense.num_layers=2")
    assert done.code == 0, done.text
    report = done.report
    assert (report["method"], report["status"]) == (method, "ok")
    assert (report["condense/num_layers"], report[f"{method}/layers"]) == (2, "cosine")
    model = load(report["compressed/checkpoint"])
    assert report["compressed/stock"] == (method == "drop_blocks")
    assert len(model.model.layers) == (2 if method == "drop_blocks" else 4)
    assert len(moe_layers(model)) == 1
    order = json.loads(report["plan/layers"])
    assert len(order) == 2
    assert set(order) <= {1, 2, 3}
    refused = job(f"method={method}", "condense.num_layers=9")
    assert refused.code == 2
    assert "num_layers=9: the model has 3 MoE layers" in refused.text
