"""What every kind of edit has: its defaults, its name, and kinds from outside the package."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from own_edits import ConstantLayer, NarrowExperts, ScaleExperts
from pictured_runs import names, save_usage
from running import ROOT
from safetensors.torch import load_file, save_file
from trainings import training

from moe_lab.models.checkpoint import load
from moe_lab.models.edits.base import EDIT_KINDS, Edit, Fate
from moe_lab.models.edits.plan import (
    Plan,
    UnknownEdit,
    apply_plan,
    check_plan,
    known_kinds,
    read_edit,
)
from moe_lab.models.forms import form_of
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.report.plots.run import draw_run
from moe_lab.types import UserError


@dataclass(frozen=True)
class Bare(Edit):
    """A kind that says nothing but its name and a field."""

    numbers: tuple[tuple[int, ...], ...] = ()

    kind = "bare"


def test_what_need_not_be_said() -> None:
    edit, layer = Bare(1, "x", ((1, 2), ())), moe_layers(tiny_model("qwen2_moe"))[0]
    assert edit.to_json() == {"index": 1, "name": "x", "edit": "bare", "numbers": [[1, 2], []]}
    assert Bare.from_json(edit.to_json()) == edit
    assert edit.changes and edit.leaves_moe and edit.trains == "nothing"
    assert not (edit.removes_decoder or edit.drops_layer or edit.keeps_rows)
    assert edit.left(layer.info) == layer.info
    assert edit.apply(layer, {}) is edit.restructure(layer, {}) is layer.block
    assert edit.apply(layer.block, {}) is layer.block, "also of a block that is no MoE layer"
    assert (edit.experts_kept, edit.num_experts_left, edit.gated_parts) == (None, None, None)
    assert (edit.scores, edit.expert_scores, edit.layer_score, edit.divergence) == (
        (),
        (),
        None,
        (),
    )
    assert (edit.title, edit.cells, edit.fate(3)) == ("bare", {}, Fate("kept"))
    assert edit.written(layer) is None
    edit.check(layer.info)
    with pytest.raises(UserError, match="layer 1: the edit 'bare' works on an MoE layer"):
        edit.check(None)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(TypeError, match="two kinds of edits are called 'prune'"):
        type("Other", (Edit,), {"kind": "prune"})
    assert EDIT_KINDS["prune"].__module__ == "moe_lab.models.edits.prune"
    again = type("Bare", (Edit,), {"kind": "bare", "__module__": __name__})
    assert EDIT_KINDS["bare"] is again, "the same class, its file imported once more"
    EDIT_KINDS["bare"] = Bare


def test_an_unknown_kind_is_shown_and_written_back_and_no_more() -> None:
    info = moe_layers(tiny_model("qwen2_moe"))[0].info
    values = {"index": 1, "name": info.name, "edit": "of_tomorrow", "bits": [3, [4.5]], "kept": [0]}
    edit = read_edit(values)
    assert isinstance(edit, UnknownEdit) and edit.to_json() == values
    assert edit.title == "of_tomorrow (not known here)" and edit.changes
    plan = Plan((edit,))
    for refused in (
        lambda: check_plan([info], plan.edits),
        lambda: apply_plan(tiny_model("qwen2_moe"), plan),
        lambda: form_of(tiny_model("qwen2_moe").config, plan.edits),
    ):
        with pytest.raises(UserError, match=r"'of_tomorrow'.*known are .*prune.*Import the module"):
            refused()
    further = {"index": 1, "name": "x", "edit": "prune", "kept": [0], "of_tomorrow": 1}
    assert read_edit(further).to_json() == further
    with pytest.raises(UserError, match=r"'prune' with the fields \['kept', 'of_tomorrow'\]"):
        read_edit(further).check(info)


def test_reading_plans_is_light(tmp_path: Path) -> None:
    """No torch, nor anything of ours that needs it, to list the kinds and read a plan."""
    (tmp_path / "plan.json").write_text(Plan((Bare(1, "x"),)).to_text())
    code = (
        "import sys\nfrom pathlib import Path\nfrom moe_lab.models.edits.plan import *\n"
        f"plan = Plan.load(Path({str(tmp_path / 'plan.json')!r}))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'moe_lab.models.layers'}\n"
        "print(sorted(known_kinds()), plan.edits[0].title, heavy & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = [one.kind for one in known_kinds().values() if one.__module__.startswith("moe_lab.")]
    assert found.stdout.strip() == f"{sorted(ours)} bare (not known here) set()"
    assert len(ours) == 13


FRESH = """
import json, sys
import torch
import moe_lab
from safetensors.torch import load_file
if sys.argv[1] != "nothing":
    __import__(sys.argv[1])
expected = load_file(sys.argv[2] + "/expected.safetensors")
try:
    with torch.no_grad():
        logits = moe_lab.load(sys.argv[2] + "/model")(input_ids=expected["input_ids"]).logits
    print("RESULT", float((logits - expected["logits"]).abs().max()))
except ValueError as error:
    print("RESULT", error)
"""


def loaded_elsewhere(folder: Path, module: str) -> str:
    """What a fresh process says of a checkpoint, after it has imported a module."""
    given = [sys.executable, "-c", FRESH, module, str(folder)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        given, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    return done.stdout.split("RESULT ")[1].strip()


def made(folder: Path, *edits: Edit, **tensors: torch.Tensor) -> tuple[torch.nn.Module, Plan]:
    """A tiny model after a way of the edits' plan through its file; saved, with its logits."""
    model, batch = tiny_model("qwen2_moe"), tiny_batch(padding=False)
    model.save_pretrained(folder / "source")
    named = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    plan = Plan(
        tuple(dataclasses.replace(edit, name=named[edit.index]) for edit in edits),
        tensors={f"layers.{name[1:]}.value": one for name, one in tensors.items()},
    )
    plan.write_tensors(folder / "plan.json")
    (folder / "plan.json").write_text(plan.to_text())
    plan = Plan.load(folder / "plan.json")
    check_plan([layer.info for layer in moe_layers(model)], plan.edits)
    foreseen = form_of(model.config, plan.edits, padding=0.0)
    apply_plan(model, plan)
    save_file(
        {"input_ids": batch["input_ids"], "logits": logits_of(model, batch)},
        folder / "expected.safetensors",
    )
    form = save_checkpoint(model, folder / "model", folder / "source", padding=0.0)
    assert form.reason == foreseen.reason
    return model, plan


def test_a_kind_from_outside_that_changes_no_shape(tmp_path: Path) -> None:
    model, plan = made(tmp_path, ScaleExperts(1, "", 0.5))
    assert plan.edits == (ScaleExperts(1, "model.layers.1.mlp", 0.5),)
    before, after = tiny_model("qwen2_moe"), model
    for one, other in zip(moe_layers(before), moe_layers(after), strict=True):
        factor = 0.5 if one.info.index == 1 else 1.0
        assert torch.equal(one.experts.down_proj * factor, other.experts.down_proj)
    assert loaded_elsewhere(tmp_path, "nothing") == "0.0", "stock, and known to all"


def test_a_kind_from_outside_with_a_structure_in_place(tmp_path: Path) -> None:
    model, _ = made(tmp_path, NarrowExperts(2, "", 8))
    layers = json.loads((tmp_path / "model" / "config.json").read_text())["moe_lab"]["layers"]
    plain = {"num_experts": 8}
    own = {"expert_width": 8, "own": {"narrow_experts": {"width": 8}}}
    assert layers == {"1": plain, "2": plain | own, "3": plain}
    assert loaded_elsewhere(tmp_path, "own_edits") == "0.0"
    refused = loaded_elsewhere(tmp_path, "nothing")
    assert "layer 2 of this checkpoint" in refused and "'narrow_experts'" in refused
    again = load(tmp_path / "model")
    assert [layer.info.expert_width for layer in moe_layers(again)] == [16, 8, 16]
    save_checkpoint(again, tmp_path / "again", tmp_path / "model")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))


def test_a_kind_from_outside_with_a_block_of_its_own(tmp_path: Path) -> None:
    value = torch.linspace(-1, 1, 32)
    model, plan = made(tmp_path, ConstantLayer(3, "", of_expert=6), v3=value)
    assert torch.equal(model.model.layers[3].mlp.value, value)
    layers = json.loads((tmp_path / "model" / "config.json").read_text())["moe_lab"]["layers"]
    assert layers["3"] == {"own": {"constant_layer": {"hidden_size": 32}}}
    assert loaded_elsewhere(tmp_path, "own_edits") == "0.0"
    # It can be tuned, since it says so, and nothing else moves.
    ready = load(tmp_path / "model", dtype="float32")
    training(ready, plan, tmp_path).run()
    save_checkpoint(ready, tmp_path / "tuned", tmp_path / "model")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "tuned"))
    assert one.keys() == other.keys()
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    assert moved == {"model.layers.3.mlp.value"}
    # It is drawn in its own words.
    save_usage(tmp_path, {1: 8, 2: 8, 3: 8})
    assert names(draw_run(tmp_path)) == ["usage", "kept", "curves"]


def test_what_it_says_to_train_is_what_trains(tmp_path: Path) -> None:
    _, plan = made(tmp_path, ScaleExperts(2, "", 0.5))
    model = load(tmp_path / "model", dtype="float32")
    before = {name: one.clone() for name, one in model.named_parameters()}
    training(model, plan, tmp_path).run()
    moved = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert moved and all(
        name.startswith(("model.layers.2.mlp.experts.", "model.layers.2.mlp.shared_expert."))
        for name in moved
    )
    _, plan = made(tmp_path / "narrow", NarrowExperts(2, "", 8))
    with pytest.raises(UserError, match=r"edits none so \(narrow_experts\)"):
        training(load(tmp_path / "narrow" / "model"), plan, tmp_path).run()
