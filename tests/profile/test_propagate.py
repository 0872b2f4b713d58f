"""Statistics behind layers that are pruned already, against full forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_scores import Listed

from moe_lab.methods.metrics.naee import Naee
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile


def test_propagated_is_brute_force(case) -> None:
    """Each layer's statistics in a full forward of the model that was pruned up to there."""
    model, batches, profile = case.model, case.batches, case.profile()
    found = Prune(reap, Listed(4), propagate=True).plan(profile)
    changed = copy.deepcopy(model)
    for number, edit in enumerate(found.edits):
        layer = collect_statistics(changed, batches)[number]
        expected = reap(layer)
        assert layer.info.index == edit.index
        torch.testing.assert_close(
            torch.tensor(edit.scores, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9
        )
        assert edit.kept == budget.best(layer.info, expected, 4)
        assert found.notes["experts_without_tokens"][str(edit.index)] == (layer["count"] == 0).sum()
        prune_layer(moe_layers(changed)[number], list(edit.kept))
    assert found.notes["statistics"] == "re-measured behind compressed layers"
    plain = Prune(reap, Listed(4)).plan(profile)
    assert plain.notes["statistics"] == "intact model"
    assert plain.edits[0] == found.edits[0]
    assert plain.edits[1].scores != found.edits[1].scores
    applied = copy.deepcopy(model)
    apply_plan(applied, found)
    with torch.no_grad():
        assert torch.equal(applied(**batches[0]).logits, changed(**batches[0]).logits)


def test_propagating_what_changes_nothing(case) -> None:
    profile = case.profile()
    found = Prune(reap, Uniform(0.0), propagate=True).plan(profile)
    plain = Prune(reap, Uniform(0.0)).plan(profile)
    for edit, other in zip(found.edits, plain.edits, strict=True):
        assert edit.kept == other.kept == tuple(range(8))
        assert edit.scores == pytest.approx(other.scores, rel=1e-12)


def test_the_model_is_left_as_it_was(case) -> None:
    model, batches, profile = case.model, case.batches, case.profile()
    with torch.no_grad():
        before = model(**batches[0]).logits
        Prune(reap, Listed(4), replacement="constant", propagate=True).plan(profile)
        assert torch.equal(model(**batches[0]).logits, before)


def test_from_disk_with_no_memory_for_states_it_finds_the_same(case, tmp_path) -> None:
    model, batches, profile = case.model, case.batches, case.profile()
    model.save_pretrained(tmp_path / "model")

    def open_stream(number: int | None = None) -> LayerStream:
        source = LayerwiseModel(Checkpoint(tmp_path / "model", "float64"))
        return LayerStream(source, batches, Activations(limit=0, folder=tmp_path))

    again = Profile(profile.statistics, open_stream)
    for method in (Prune(reap, Listed(4), propagate=True), Prune(Naee(), Listed(6))):
        assert method.plan(again).to_text() == method.plan(profile).to_text()
