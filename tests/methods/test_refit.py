"""method.refit=true: what stays gets the columns of the least error, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import in_fresh_process
from families import logits_of, tiny_batch, tiny_model
from narrowing import UNEVEN, narrow_plan
from odd_blocks import odd_model as odd_block
from odd_families import odd_model
from refits import (
    activations,
    before,
    by_hand,
    carried_out,
    columns,
    divergence,
    layer_of,
    profile_of,
    pruned,
    seen,
    text,
)
from safetensors.torch import save_file

from moe_lab.methods.dern import Dern
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.sensitivity import Sensitivity
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.methods.refit import check_refits, with_refits
from moe_lab.methods.ridge import Ridge
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.refit import RefitExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.refitting import shared_refit_name
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def model_of(family: str):
    odd = ("dbrx", "step3p7", "jetmoe", "llama4_text", "longcat_flash")
    return odd_model(family) if family in odd else tiny_model(family)


def check_by_hand(model, plan: Plan, index: int, targets: str, kind: str = "output") -> None:
    """A layer's new columns against scipy's, on raw activations of a plain forward pass."""
    [edit] = [one for one in plan.edits if one.kind == "refit" and one.index == index]
    [ridge] = edit.ridges
    other, batch = carried_out(model, before(plan, index, targets)), text()
    wanted, passed = seen(model, index, batch), seen(other, index, batch)
    missing_TD = wanted.leaving_TD.double() - passed.leaving_TD.double()
    weight_T = torch.ones(len(missing_TD))
    if kind == "output":
        weight_T = 1 / wanted.leaving_TD.square().mean(dim=1)
    layer = layer_of(other, index)
    z_TN, old_ND = activations(layer, passed), columns(layer)
    expected_ND = by_hand(z_TN, missing_TD, weight_T, Ridge(*ridge), old_ND)
    new_ND = columns(layer_of(carried_out(model, plan), index))
    change = float((expected_ND - old_ND).norm())
    assert change > 0.01 * float(old_ND.norm())
    assert float((new_ND - expected_ND).norm()) < 2e-3 * change


@pytest.mark.parametrize("targets", ["intact", "sequential"])
@pytest.mark.parametrize(
    "family", ["qwen2_moe", "deepseek_v3", "mixtral", "gpt_oss", "dbrx", "longcat_flash"]
)
def test_it_is_what_scipy_makes_of_raw_activations(family: str, targets: str) -> None:
    model = model_of(family)
    plan = pruned(model, [text()], targets=targets)
    refitted = [edit.index for edit in plan.edits if edit.kind == "refit"]
    for index in {refitted[0], refitted[-1]}:
        check_by_hand(model, plan, index, targets)


def test_tokens_weigh_the_same_where_that_is_asked_for() -> None:
    model = tiny_model("mixtral")
    plan = pruned(model, [text()], token_weight="none")
    check_by_hand(model, plan, 1, "sequential", kind="none")


def test_uneven_experts_are_refitted_unit_by_unit() -> None:
    model = tiny_model("qwen2_moe")
    plan = narrow_plan(model, UNEVEN)
    made = with_refits(profile_of(model, [text()]), plan, "sequential", "output")
    indices = [edit.index for edit in made.edits if edit.kind == "refit"]
    assert len(indices) > 1
    check_by_hand(model, made, indices[-1], "sequential")


def test_shared_experts_that_became_narrower_are_refitted_with_the_others() -> None:
    model = tiny_model("qwen2_moe")
    plan = narrow_plan(model, (8,) * 8, shared=12)
    made = with_refits(profile_of(model, [text()]), plan, "intact", "output")
    indices = [edit.index for edit in made.edits if edit.kind == "refit"]
    shapes = {tuple(made.tensors[shared_refit_name(index)].shape) for index in indices}
    assert shapes == {(32, 12)}
    check_by_hand(model, made, indices[0], "intact")


@pytest.mark.parametrize("targets", ["intact", "sequential"])
def test_where_nothing_goes_nothing_changes(targets: str) -> None:
    model = tiny_model("qwen2_moe")
    infos = [layer.info for layer in moe_layers(model)]
    profile = profile_of(model, [text()])
    whole = narrow_plan(model, (16,) * 8)  # an edit that leaves every unit
    made = with_refits(profile, whole, targets, "output")
    assert made.edits == whole.edits and made.notes["refit"]["error left"] == {}
    kept = Plan(tuple(KeepLayer(info.index, info.name) for info in infos))
    assert with_refits(profile, kept, targets, "output").edits == kept.edits


def test_a_layer_that_is_kept_is_not_refitted() -> None:
    model = tiny_model("mixtral")
    some = narrow_plan(model, {0: (8,) * 8, 2: (8,) * 8})
    made = with_refits(profile_of(model, [text()]), some, "sequential", "output")
    assert [(edit.index, edit.kind) for edit in made.edits] == [
        (0, "narrow"), (0, "refit"), (2, "narrow"), (2, "refit"),
    ]  # fmt: skip
    check_by_hand(model, made, 2, "sequential")


MANY = [text(seed) for seed in range(4)]


def planned(model, method) -> Plan:
    method.check([layer.info for layer in moe_layers(model)])
    return method.plan(profile_of(model, MANY))


METHODS: dict[str, Any] = {
    "experts": lambda **asked: Prune(reap, Uniform(0.5), **asked),
    "neurons": lambda **asked: Prune(energy, Uniform(0.5), unit="neurons", **asked),
    "both": lambda **asked: Prune(energy, Sensitivity(0.7), unit="both", **asked),
    "merge": lambda **asked: Merge(1, num_experts=4, **asked),
    "merge, one row each": lambda **asked: Merge(1, num_experts=4, router="dominant", **asked),
    "ream, layer behind layer": lambda **asked: Merge(1, num_experts=4, grouping="ream", **asked),
    "dern": lambda **asked: Dern(reap, Uniform(0.5), **asked),
    "stand-ins": lambda **asked: Prune(reap, Uniform(0.5), replacement="constant", **asked),
}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("method", METHODS)
def test_the_predictions_on_other_text_are_nearer(method: str, family: str) -> None:
    model, other = tiny_model(family), text(99)
    bare, repaired = (planned(model, METHODS[method](refit=refit)) for refit in (False, True))
    without_refits = [edit for edit in repaired.edits if edit.kind != "refit"]
    assert tuple(without_refits) == bare.edits and len(repaired.edits) > len(bare.edits)
    far, near = (divergence(model, carried_out(model, one), other) for one in (bare, repaired))
    assert near < far, (far, near)


def test_several_rows_of_one_expert_and_stand_ins_are_taken_as_they_compute() -> None:
    model = tiny_model("qwen2_moe")
    for method in (METHODS["merge"], METHODS["stand-ins"]):
        made = method(refit=True, targets="intact")
        plan = made.plan(profile_of(model, [text()]))
        check_by_hand(model, plan, 2, "intact")


CHECKPOINTS = {
    "qwen2_moe": "neurons",
    "deepseek_v3": "experts",
    "gpt_oss": "merge, one row each",
    "mixtral": "dern",
}


def test_a_checkpoint_computes_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    for family, method in CHECKPOINTS.items():
        model, folder = tiny_model(family), tmp_path / family
        folder.mkdir()
        model.save_pretrained(folder / "source")
        plan = METHODS[method](refit=True).plan(profile_of(model, [text()]))
        (folder / "plan.json").write_text(plan.to_text())
        plan.write_tensors(folder / "plan.json")
        edited = carried_out(model, Plan.load(folder / "plan.json"))
        assert save_checkpoint(edited, folder / "model", folder / "source", 1.0).stock
        save_file(tiny_batch() | {"logits": logits_of(edited)}, folder / "expected.safetensors")
    folders = [tmp_path / family for family in CHECKPOINTS]
    assert in_fresh_process("stock", folders) == dict.fromkeys(CHECKPOINTS, 0.0)


def test_what_the_plan_says_of_it() -> None:
    plan = pruned(tiny_model("qwen2_moe"), [text()])
    edits = [edit for edit in plan.edits if isinstance(edit, RefitExperts)]
    told = plan.notes["refit"]
    assert told["targets"] == "sequential"
    assert told["error left"] == {str(edit.index): edit.error for edit in edits}
    for edit in edits:
        assert edit.shared and 0 < edit.error < edit.held_error < 1


def test_its_options_are_told_and_decide_where_there_is_a_refit() -> None:
    options = {"refit": False, "targets": "intact", "token_weight": "none", "mtp": "prune"}
    given = options | {"metric": {}, "ratio": {}}
    plain, refitted = METHODS["experts"](), METHODS["experts"](refit=True)
    assert plain.identity(given).keys() == {"refit", "mtp", "metric", "ratio"}
    assert refitted.identity(given | {"refit": True})["targets"] == "intact"
    assert Prune.settings(options) == {"refit": False, "mtp": "prune"}
    assert Prune.settings(options | {"refit": True})["token_weight"] == "none"


def test_a_groups_plan_is_not_refitted_on_all_text() -> None:
    assert METHODS["experts"]().takes_groups
    assert not METHODS["experts"](refit=True).takes_groups


def test_the_example_has_refits_behind_the_edits() -> None:
    infos = [layer.info for layer in moe_layers(tiny_model("mixtral"))]
    for name, method in METHODS.items():
        kinds = [edit.kind for edit in method(refit=True).example(infos)]
        assert kinds[-4:] == ["refit"] * 4 and "refit" not in kinds[:-4], name
        assert "refit" not in [edit.kind for edit in method().example(infos)]


def test_too_few_documents_are_refused_before_anything_is_decided() -> None:
    model, few = tiny_model("mixtral"), text(documents=5)

    def never(profile: Any) -> None:
        raise AssertionError("decided")

    method = METHODS["experts"](refit=True)
    object.__setattr__(method, "decide", never)
    with pytest.raises(UserError, match="has 5 documents"):
        method.plan(profile_of(model, [few]))


@pytest.mark.parametrize("kind", ["a norm", "a limit", "a norm behind", "another gate"])
def test_a_layer_that_does_more_than_add_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"layer 1 of qwen2_moe cannot be refitted.*refit=false"):
        check_refits(profile_of(odd_block(kind), [text()]))


@pytest.mark.parametrize("kind", ["a factor", "an average", "a bias of each expert"])
def test_factors_and_biases_of_a_block_are_no_obstacle(kind: str) -> None:
    model = odd_block(kind)
    plan = pruned(model, [text()], targets="intact")
    bare = Plan(tuple(edit for edit in plan.edits if edit.kind != "refit"))
    far, near = (divergence(model, carried_out(model, one), text()) for one in (bare, plan))
    assert near < 0.8 * far


def test_a_whole_job_is_refitted_and_says_so(job: Any) -> None:
    asked = ("method=prune", "metric=reap", "ratio.ratio=0.5")
    plain, done = job(*asked), job(*asked, "method.refit=true")
    assert plain.code == done.code == 0, done.text
    assert done.report["prune/refit"] and "prune/targets" not in plain.report
    assert done.report["prune/targets"] == "sequential"
    assert done.report["compressed/stock"] == plain.report["compressed/stock"]
    again = job(*asked, "method.refit=true")
    assert again.report["cached/plan"]
    other = job(*asked, "method.refit=true", "method.targets=intact")
    assert not other.report["cached/plan"]
    ignored = job(*asked, "method.targets=intact")  # of no refit: the plan that is there
    assert ignored.report["cached/plan"]


def test_a_job_with_too_little_text_ends_as_a_users_mistake(job: Any) -> None:
    done = job("method=prune", "metric=reap", "method.refit=true", "calibration.num_samples=5")
    assert done.code == 2 and "has 5 documents" in done.text
