"""method=factorize: budgets, refusals, and what a plan does to a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import FEW
from families import tiny_model
from refits import carried_out, divergence, profile_of, text

from moe_lab.measure.speed import parameters
from moe_lab.methods.factorize import Factorize, parameters_of, shapes_of
from moe_lab.methods.factorizing.d2moe import D2MoE
from moe_lab.methods.factorizing.mobe import MoBE
from moe_lab.methods.factorizing.svd import SVD
from moe_lab.methods.ratios.sensitivity import Sensitivity
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan
from moe_lab.models.factorized import FactorizedExperts
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

FORMS = {
    "svd": "svd",
    "shared_basis": "shared_basis",
    "mobe": MoBE(steps=20),
    "d2moe": "d2moe",
    "cp": "cp",
    "tr": "tr",
}


def infos(model):
    return [layer.info for layer in moe_layers(model)]


def planned(model, method: Factorize) -> Plan:
    method.check(infos(model))
    return method.plan(profile_of(model, [text()]))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_its_budget_and_is_carried_out(form: str) -> None:
    model = tiny_model("qwen2_moe")
    method = Factorize(Uniform(0.3), FORMS[form])
    plan = planned(model, method)
    own = sum(map(parameters_of, infos(model)))
    assert own == 3 * 8 * 3 * 32 * 16
    made = carried_out(model, plan)
    left = sum(parameter.numel() for one in made.modules() if isinstance(one, FactorizedExperts)
               for parameter in one.parameters())  # fmt: skip
    assert parameters(model) - parameters(made) == own - left
    assert left <= 0.7 * own
    assert left == sum(edit.parameters for edit in plan.edits) > 0.6 * own
    given = plan.notes["given"]
    assert given["expert_parameters"] == f"{own - left:,} of {own:,}"
    assert given["ratio"] == pytest.approx(1 - left / own) and plan.notes["asked"] == {"ratio": 0.3}
    assert all(0 <= error < 1 for edit in plan.edits for error in edit.error)
    assert 0 < divergence(model, made, text(1)) < 3


def test_less_is_lost_with_more_parameters() -> None:
    model = tiny_model("mixtral")
    lost = [
        divergence(
            model, carried_out(model, planned(model, Factorize(Uniform(ratio), "svd"))), text(1)
        )
        for ratio in (0.2, 0.5, 0.8)
    ]
    assert lost == sorted(lost)


def test_some_layers_alone() -> None:
    model = tiny_model("mixtral")
    plan = planned(model, Factorize(Uniform(0.5), SVD(whiten=False), layers=[1, 3]))
    assert [edit.kind for edit in plan.edits] == ["keep", "factorize", "keep", "factorize"]
    made = carried_out(model, plan)
    assert [layer.info.index for layer in moe_layers(made)] == [0, 2]
    assert plan.notes["given"]["ratio"] == pytest.approx(0.5, abs=0.1), "of these layers' experts"
    with pytest.raises(UserError, match=r"method.layers names \[7\]"):
        planned(model, Factorize(Uniform(0.5), layers=[7]))


@pytest.mark.parametrize("of", ["parameters", "bytes"])
def test_shares_of_the_whole_model(of: str) -> None:
    model = tiny_model("mixtral")
    plan = planned(model, Factorize(Uniform(0.2, of=of), SVD(whiten=False)))
    assert plan.notes["given"]["ratio"] == pytest.approx(0.2, abs=0.03)
    whole, left = parameters(model), parameters(carried_out(model, plan))
    assert plan.notes["given"]["ratio"] == pytest.approx(1 - left / whole, abs=1e-6)


def test_a_size_in_memory() -> None:
    model = tiny_model("mixtral")
    size = infos(model)[0].model_bytes
    asked = 0.8 * size / 2**30
    plan = planned(model, Factorize(Uniform(0.0, target_gib=asked), SVD(whiten=False)))
    given = plan.notes["given"]["target_gib"]
    assert 0.95 * asked < given <= asked
    made = carried_out(model, plan)
    assert infos(model)[0].model_bytes - 4 * (parameters(model) - parameters(made)) == given * 2**30


def test_what_is_asked_of_the_model_is_what_the_form_needs() -> None:
    model = tiny_model("mixtral")
    for form in (D2MoE(weighting="frequency", num_samples=2), D2MoE(num_samples=2)):
        plan = planned(model, Factorize(Uniform(0.4), form))
        assert {edit.form for edit in plan.edits} == {"d2moe"}
    assert (
        planned(model, Factorize(Uniform(0.4), "svd")).to_text()
        == planned(model, Factorize(Uniform(0.4), SVD())).to_text()
    )


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Factorize(Sensitivity(0.5)), "all layers the same share of parameters: ratio=uniform"),
        (Factorize(Uniform(0.5, floor=2)), "ratio.floor counts experts.*ratio.floor=null"),
        (Factorize(Uniform(0.5, round_to=4)), "ratio.round_to counts experts.*ratio.round_to=1"),
        (Factorize(Uniform(0.0)), "ratio.ratio=0 takes nothing away"),
        (Factorize(Uniform(0.99), "svd"), "may have 40 of 4,096 parameters, and factors of rank 1"),
        (Factorize(Uniform(0.9, of="parameters")), r"of the experts' 49,152 parameters would go"),
        (Factorize(Uniform(0.0, target_gib=1.0)), "more than none and fewer than all"),
        (Factorize(Uniform(0.5), "svds"), "method.form='svds'"),
        (Factorize(Uniform(0.5), SVD(damping=0.0)), "form.damping=0.0: it must be above 0"),
        (Factorize(Uniform(0.9), "mobe"), "gate projections of a layer may have 0 of 4,096"),
        (Factorize(Uniform(0.5), layers="last"), "method.layers='last' does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(method: Factorize, words: str) -> None:
    with pytest.raises(UserError, match=words):
        method.check(infos(tiny_model("mixtral")))


def test_the_shapes_and_the_example() -> None:
    model = tiny_model("qwen2_moe")
    info = infos(model)[0]
    assert shapes_of(info) == {"gate": (8, 16, 32), "up": (8, 16, 32), "down": (8, 32, 16)}
    method = Factorize(Uniform(0.3))
    [edit, *_] = method.example(infos(model))
    assert edit.parameters <= 0.7 * edit.of and edit.gate["rank"] == int(512 * 0.7 / 48)
    assert edit.up["rank"] >= edit.gate["rank"], "what gate leaves for want of a rank is up's"


def test_the_options_that_decide() -> None:
    options = {"form": "svd", "ratio": {"ratio": 0.3}, "layers": "all"}
    by_name = Factorize(Uniform(0.3)).identity(options)
    node = {"_target_": "moe_lab.methods.factorizing.svd.SVD", "whiten": True, "damping": 1e-6,
            "gated": False, "token_weight": "none", "num_samples": None}  # fmt: skip
    assert Factorize(Uniform(0.3), SVD()).identity(options | {"form": node}) == by_name
    assert by_name["form"]["name"] == "svd" and by_name["ratio"] == {"ratio": 0.3}
    told = Factorize.settings(options | {"form": node | {"gated": True}})
    assert told["form"] == "svd" and told["gated"] is True


def test_a_whole_run_with_tuning(job: Callable[..., Any]) -> None:
    """The factors train, and what is written says what was asked and given."""
    done = job(
        *FEW, "method=factorize", "form=shared_basis", "form.gated=true", "ratio.ratio=0.4",
        "finetune=experts", "eval=none", "measure=none",
    )  # fmt: skip
    assert done.code == 0, done.text
    report = done.report
    assert (report["factorize/form"], report["factorize/gated"]) == ("shared_basis", True)
    assert report["ratio"] == 0.4 and 0.4 <= report["plan/ratio"] < 0.5
    assert report["compressed/stock"] is False
    assert "factorised experts" in report["compressed/form"]
    before, after = (
        load(Path(report[f"{name}/checkpoint"])).state_dict()
        for name in ("compressed", "finetuned")
    )
    names = [name for name in before if "_factors." in name]
    assert names and before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in names)
