"""RIY's profile: what it says is the plan, and nothing but plain prunes is said."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_model

from moe_lab.export.given import Given
from moe_lab.export.riy import export, read_profile
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import masked_layer
from moe_lab.types import UserError


def given(folder: Path, *edits: dict, kind: type = PruneExperts, family: str = "mixtral") -> Given:
    """A dense model in `folder`, and a plan for it beside it."""
    model = tiny_model(family)
    model.save_pretrained(folder / "dense")
    names = {one.info.index: one.info.name for one in moe_layers(model)}
    plan = Plan(tuple(kind(name=names[edit["index"]], **edit) for edit in edits))
    (folder / "plan.json").write_text(plan.to_text())
    plan_file = folder / "plan.json"
    return Given(str(plan_file), plan_file=plan_file, model=str(folder / "dense"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "qwen3_moe"])
def test_masking_what_it_lists_computes_the_pruned_model(tmp_path: Path, family: str) -> None:
    """As the engine says it does: the listed experts' logits are -inf before experts are chosen."""
    kept = {1: (0, 2, 3, 7), 3: (6, 5, 4, 1, 0)}
    plan = given(tmp_path, *({"index": i, "kept": some} for i, some in kept.items()), family=family)
    (told,) = export(plan, tmp_path / "one.json")
    written = json.loads((tmp_path / "one.json").read_text())
    assert written.keys() == {"version", "model", "pruned_experts"}
    assert (written["version"], written["model"]) == (1, "dense")
    assert [1, 1] in written["pruned_experts"] and len(written["pruned_experts"]) == 7
    assert told.startswith("7 of ")

    model = Checkpoint(tmp_path / "dense").load()
    layers = {one.info.index: one for one in moe_layers(model)}
    left = read_profile(tmp_path / "one.json", [one.info for one in layers.values()])
    with ExitStack() as stack:
        for index, layer in layers.items():
            stack.enter_context(masked_layer(layer, left[index]))
        masked = logits_of(model)
    apply_plan(model, plan.plan())
    assert torch.allclose(masked, logits_of(model), atol=1e-5)


def test_what_is_no_plain_prune_is_refused(tmp_path: Path) -> None:
    for number, (kind, edit, words) in enumerate(
        [
            (PruneExperts, {"kept": (0, 1), "replacement": "zero"}, r"prune \(zero\)"),
            (MergeExperts, {"kept": (0, 1), "groups": ((0, 2, 3), (1, 4, 5, 6, 7))}, "merge"),
            (CondenseLayer, {"experts": (0, 1), "gates": (0.5, 0.5)}, "condense"),
        ]
    ):
        folder = tmp_path / str(number)
        plan = given(folder, {"index": 2} | edit, kind=kind)
        with pytest.raises(UserError, match=rf"plain prunes alone.* layer 2 has {words}"):
            export(plan, tmp_path / "one.json")
    plan = given(tmp_path / "twice", {"index": 2, "kept": (0, 1, 2)}, {"index": 2, "kept": (0, 1)})
    with pytest.raises(UserError, match="layer 2 has prune, then prune"):
        export(plan, tmp_path / "one.json")
    tuned = replace(given(tmp_path / "t", {"index": 2, "kept": (0, 1)}), made_by="finetune")
    with pytest.raises(UserError, match=r"was changed further \(finetune\): serve the checkpoint"):
        export(tuned, tmp_path / "one.json")
    few = given(tmp_path / "few", {"index": 2, "kept": (0,)})
    with pytest.raises(UserError, match="1 of 8 experts would stay"):
        export(few, tmp_path / "one.json")
    assert not (tmp_path / "one.json").exists()


def test_a_bias_behind_the_logits_may_choose_what_is_masked(tmp_path: Path) -> None:
    """Then the engine would spend a token's place on an expert that is gone."""
    plan = given(tmp_path, {"index": 2, "kept": (0, 1, 2, 3)}, family="glm4_moe")
    folder = tmp_path / "dense"

    def write(bias: list[float]) -> None:
        model = Checkpoint(folder).load()
        with torch.no_grad():
            model.model.layers[2].mlp.gate.e_score_correction_bias.copy_(torch.tensor(bias))
        model.save_pretrained(folder)

    write([0.0, 0.1, 0.5, 0.6, 0.3, 0.2, 0.1, 0.4])
    export(plan, tmp_path / "one.json")
    write([0.0, 0.1, 0.2, 0.6, 0.3, 0.2, 0.1, 0.4])
    with pytest.raises(UserError, match=r"layer 2 adds a bias to its scores \(.*correction_bias\)"):
        export(plan, tmp_path / "one.json")
