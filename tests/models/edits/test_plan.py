"""Plans: what lies on disk is what was made, and is carried out as it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from own_edits import NarrowDense, NarrowExperts
from stand_ins import replaced
from torch import nn
from trainings import recipe_of

from moe_lab.models.checkpoint import load
from moe_lab.models.editing import set_block
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan, check_plan, known_kinds, read_edit
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import form_of
from moe_lab.models.layers import moe_layers, standing_at
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import propagated
from moe_lab.report.plots.run import draw_run
from moe_lab.report.run_files import read_plan
from moe_lab.runs.settings import planned_layers
from moe_lab.types import UserError


def test_a_plan_keeps_its_tensors_beside_it(tmp_path: Path) -> None:
    plan = replaced(tiny_model("mixtral"), "constant", "zero")
    plan.write_tensors(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(plan.to_text())
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    [name] = read.tensors
    assert torch.equal(read.tensors[name], plan.tensors[name])
    plain = Plan((PruneExperts(0, "x", kept=(1, 2)),))
    plain.write_tensors(tmp_path / "other.json")
    assert not (tmp_path / "other.safetensors").exists()
    assert "replacement" not in plain.to_text()


def test_plans_that_differ_in_a_layer_differ_in_a_line() -> None:
    """So that two can be compared with diff."""
    edits = tuple(PruneExperts(i, f"layers.{i}", kept=(0, 1, 3), scores=(0.5,) * 4)
                  for i in range(4))  # fmt: skip
    one = Plan(edits, layer_order=(2, 1), layer_divergence=(0.1, 0.2), notes={"scores": "of reap"})
    other = replace(one, edits=(*edits[:2], replace(edits[2], kept=(1, 2, 3)), edits[3]))
    lines = list(zip(one.to_text().splitlines(), other.to_text().splitlines(), strict=True))
    assert [a == b for a, b in lines].count(False) == 1
    assert len(lines) > len(edits)


OLD = {
    "keep": '{"index": 4, "name": "x", "edit": "keep", "scores": [0.5]}',
    "prune": '{"index": 4, "name": "x", "edit": "prune", "kept": [0, 3], "scores": [4.25, 1.0]}',
    "constant": '{"index": 4, "name": "x", "edit": "prune", "kept": [0, 3], '
    '"replacement": "constant", "scores": []}',
    "merge": '{"index": 4, "name": "x", "edit": "merge", "kept": [0, 2], "groups": [[0, 1], [2]], '
    '"weights": [[0.5, 0.5], [1.0]], "align": "none", "router": "all", "scores": [1.0, 2.0]}',
    "condense": '{"index": 4, "name": "x", "edit": "condense", "experts": [0, 3], '
    '"gates": [0.5, 0.25], "shared_gate": 1.0, "divergence": [0.3, 0.2, 0.1], "widths": [8, 8]}',
    "drop_layer": '{"index": 4, "name": "x", "edit": "drop_layer", "scores": [0.99]}',
    "drop_block": '{"index": 4, "name": "x", "edit": "drop_block", "scores": [0.97]}',
}


@pytest.mark.parametrize("name", OLD)
def test_old_plans_are_read_and_written_to_the_byte(name: str, tmp_path: Path) -> None:
    text = f'{{\n  "statistics": "intact model",\n  "searched": [],\n  "layers": [\n    {OLD[name]}'
    text += "\n  ]\n}\n"
    (tmp_path / "plan.json").write_text(text)
    read = Plan.load(tmp_path / "plan.json")
    assert read.to_text() == text
    [edit] = read.edits
    assert type(edit) is known_kinds()[edit.kind]


def test_an_edit_says_only_what_its_kind_uses() -> None:
    for edit in (PruneExperts(3, "x"), CondenseLayer(3, "x"), MergeExperts(3, "x")):
        assert read_edit(edit.to_json()) == edit
    assert [PruneExperts(3, "x", replacement=one).keeps_rows for one in ("nothing", "zero")] == [
        False, True,
    ]  # fmt: skip
    assert "replacement" in PruneExperts(3, "x", replacement="copy").to_json()
    assert "kept" not in CondenseLayer(3, "x").to_json()


def named(model: nn.Module, *edits: Edit) -> Plan:
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    return Plan(tuple(replace(edit, name=names[edit.index]) for edit in edits))


PRUNE = PruneExperts(1, "", kept=(6, 1, 3, 4))
CONDENSE = CondenseLayer(1, "", experts=(5, 2), gates=(0.4, 0.3), shared_gate=0.5)


@pytest.mark.parametrize(
    "edits",
    [
        (PRUNE, NarrowExperts(1, "", 8)),
        (PRUNE, MergeExperts(1, "", (0, 1, 2), ((0, 3), (1,), (2,)), ((0.5, 0.5), (1.0,), (1.0,)))),
        (PRUNE, CondenseLayer(1, "", experts=(3, 0), gates=(0.4, 0.3))),
        (CONDENSE, NarrowDense(1, "", 20)),
    ],
    ids=lambda edits: edits[1].kind,
)
def test_the_second_edit_of_a_layer_works_on_what_the_first_left(
    edits: tuple[Edit, ...], tmp_path: Path
) -> None:
    """In one plan as by hand, one after another; also layer by layer, saved, and read again."""
    once, by_hand = tiny_model("qwen2_moe"), tiny_model("qwen2_moe")
    once.save_pretrained(tmp_path / "source")
    plan = named(once, PruneExperts(2, "", kept=(0, 1, 2, 3)), *edits)
    (tmp_path / "plan.json").write_text(plan.to_text())
    assert Plan.load(tmp_path / "plan.json") == plan, "two edits are two lines, in their order"
    check_plan([layer.info for layer in moe_layers(once)], plan.edits)
    foreseen = form_of(once.config, plan.edits)
    apply_plan(once, plan)
    name = plan.edits[-1].name
    apply_plan(by_hand, Plan(plan.edits[:2]))
    with torch.no_grad():
        set_block(by_hand, name, plan.edits[2].apply(standing_at(by_hand, name), {}))
    expected = logits_of(by_hand)
    assert torch.equal(logits_of(once), expected)
    assert not torch.equal(expected, first_alone(plan))
    assert save_checkpoint(once, tmp_path / "model", tmp_path / "source").reason == foreseen.reason
    assert torch.equal(logits_of(load(tmp_path / "model")), expected)


def first_alone(plan: Plan) -> torch.Tensor:
    model = tiny_model("qwen2_moe")
    apply_plan(model, Plan(plan.edits[:2]))
    return logits_of(model)


def test_a_block_is_dropped_whatever_else_happens_to_its_layer() -> None:
    one, other = tiny_model("mixtral"), tiny_model("mixtral")
    apply_plan(one, named(one, replace(PRUNE, index=1), DropBlock(1, ""), DropLayer(3, "")))
    apply_plan(other, named(other, DropBlock(1, ""), DropLayer(3, "")))
    assert one.config.num_hidden_layers == 3
    assert torch.equal(logits_of(one), logits_of(other))


def test_what_a_layer_cannot_have_is_refused_before_any_work() -> None:
    model = tiny_model("qwen2_moe")
    infos = [layer.info for layer in moe_layers(model)]
    for edits, words in (
        ((PruneExperts(0, "x", kept=(0, 1, 2)),), r"layer 0 is no MoE layer; they are \[1, 2, 3\]"),
        ((PruneExperts(1, "x", kept=(0,)),), "layer 1: 1 of 8 experts would stay"),
        ((PRUNE, PruneExperts(1, "x", kept=(0, 1))), "2 of 4 experts would stay, .* chooses 3"),
        ((replace(PRUNE, replacement="zero"), PRUNE), "cannot be pruned or merged once more"),
        ((CONDENSE, PRUNE), "the edit 'prune' works on an MoE layer, and an earlier edit"),
        ((NarrowDense(1, "x"),), "layer 1 is an MoE layer: condense it first"),
        ((PRUNE, NarrowExperts(1, "x", 17)), "layer 1 has experts of 16 hidden units"),
    ):
        with pytest.raises(UserError, match=words):
            check_plan(infos, edits)
    check_plan(infos, (PRUNE, CONDENSE, NarrowDense(1, "x")))
    check_plan(infos, (replace(PRUNE, kept=(0,), replacement="zero"),))
    with pytest.raises(UserError, match="'merge' works on an MoE layer"):
        apply_plan(model, named(model, CONDENSE, MergeExperts(1, "x")))
    with pytest.raises(UserError, match="edits layer 0, which is no MoE layer of this model"):
        apply_plan(model, Plan((PruneExperts(0, "x"),)))


def test_a_layer_edited_twice_is_shown_as_it_is_left(tmp_path: Path) -> None:
    """Pictures, the page's rows and numbers for another plan all tell the end of the chain."""
    scores = tuple(float(expert) for expert in range(8))
    chain = (replace(PRUNE, scores=scores), NarrowExperts(1, "", 8))
    plan = named(tiny_model("qwen2_moe"), *chain, KeepLayer(2, ""), KeepLayer(3, ""))
    (tmp_path / "plan.json").write_text(plan.to_text())
    assert [path.stem for path in draw_run(tmp_path)] == ["scores", "kept"]
    found, told = read_plan(plan.to_text())
    rows = [(row["index"], row["title"], row["kept"]) for row in found["layers"]]
    assert rows == [
        (1, "prune", (6, 1, 3, 4)),
        (1, "narrow_experts", (6, 1, 3, 4)),
        (2, "keep", None),
        (3, "keep", None),
    ]
    assert told == {1: list(scores)}
    assert planned_layers(tmp_path) == {"plan/layers": "[1]"}


def test_gates_behind_which_more_happens_are_not_told_apart() -> None:
    first = replace(CONDENSE, widths=(24, 16, 16))
    recipe = recipe_of(gates=True)
    recipe.check(named(tiny_model("qwen2_moe"), first))
    with pytest.raises(UserError, match=r"edits layer 1 again \(narrow_dense\).*gates=false"):
        recipe.check(named(tiny_model("qwen2_moe"), first, NarrowDense(1, "", 20)))


def test_layers_decided_one_behind_another_may_have_two_edits() -> None:
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    profile = Profile(collect_statistics(model, [batch]), lambda: LayerStream(model, [batch]))

    def two(layer: LayerStatistics) -> tuple[Edit, ...]:
        index, name = layer.info.index, layer.info.name
        counts[index] = layer["count"]
        return PruneExperts(index, name, kept=(6, 1, 3, 4)), NarrowExperts(index, name, 8)

    before, counts = logits_of(model, batch), dict[int, torch.Tensor]()
    edits = propagated(profile, two)
    assert [edit.index for edit in edits] == [1, 1, 2, 2, 3, 3]
    assert torch.equal(logits_of(model, batch), before)
    for done in (2, 3):  # what layer `done` sees is what a full forward behind the others has
        changed = tiny_model("qwen2_moe")
        apply_plan(changed, Plan(tuple(edit for edit in edits if edit.index < done)))
        expected = collect_statistics(changed, [batch])[done - 1]["count"]
        assert torch.equal(counts[done], expected)
