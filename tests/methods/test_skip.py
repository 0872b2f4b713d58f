"""method=skip: its plan, what it says of it, and a whole run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from expert_sets import Case
from running import Outcome

from moe_lab.methods.skip import Skip
from moe_lab.methods.skipping.base import SKIPPING_FILES
from moe_lab.methods.skipping.listed import Listed
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.edits.top_k import SetTopK
from moe_lab.types import UserError


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("qwen2_moe")


def test_a_plan_and_its_notes(case: Case) -> None:
    plan = Skip("listed", top_k=[1, 3, 2]).plan(case.profile())
    assert [edit.to_json()["top_k"] for edit in plan.edits] == [1, 3, 2]
    assert plan.notes == {
        "statistics": "intact model", "rule": "listed", "how": Listed.told,
        "experts_per_token": 2.0, "share_of_routed_compute": 2 / 3,
    }  # fmt: skip


@pytest.mark.parametrize(("renormalize", "kind"), [(None, SetTopK), (False, SkipExperts)])
def test_who_makes_the_weights_is_an_option(
    case: Case, renormalize: bool | None, kind: type
) -> None:
    method = Skip("listed", top_k=2, renormalize=renormalize)
    for edit in (*method.plan(case.profile()).edits, *method.example([*case.infos.values()])):
        assert type(edit) is kind
        if isinstance(edit, SkipExperts):
            assert (edit.rule, edit.value, edit.renormalize) == ("first", 2.0, False)


def test_what_is_known_before_any_work(case: Case) -> None:
    infos = list(case.infos.values())
    method = Skip("lexi", average_top_k=5 / 3)
    method.check(infos)
    assert [edit.to_json()["top_k"] for edit in method.example(infos)] == [2, 2, 1]
    assert not method.foresees_form(infos) and Skip("listed", top_k=1).foresees_form(infos)
    assert method.foreseen(infos) == dict.fromkeys(case.infos, 8)
    assert method.from_routers
    assert [part.__name__ for part in method.parts()] == ["Lexi"]


def test_the_seed_counts_only_where_something_is_drawn() -> None:
    given = {"rule": "lexi", "average_top_k": 2, "seed": 7}
    assert Skip(**given).identity(given) == given
    for changed in ({"inputs": "text"}, {"rule": "ratio"}):
        assert "seed" not in Skip(**given | changed).identity(given | changed)
    assert Skip.settings({"rule": "listed", "top_k": {3: 1, 4: 2}})["top_k"] == "3: 1, 4: 2"


@pytest.mark.parametrize(
    ("rule", "options"),
    [("naee", {}), ("listed", {"top_k": 1}), ("entropy", {}), ("ratio", {}), ("weight", {}),
     ("lexi", {"average_top_k": 1.5}), ("top_p", {"mass": 0.5})],
)  # fmt: skip
def test_every_rule_takes_the_run_s_seed(case: Case, rule: str, options: dict) -> None:
    infos = list(case.infos.values())[:1]
    if rule == "naee":
        infos = [dataclasses.replace(info, top_k=2) for info in infos]
    Skip(rule, seed=7, **options).check(infos)


def test_a_rule_that_does_not_exist_is_refused(case: Case) -> None:
    assert SKIPPING_FILES[0] == "moe_lab.methods.skipping"
    with pytest.raises(
        UserError, match="there are entropy, lexi, listed, naee, ratio, top_p, weight"
    ):
        Skip("best").check(list(case.infos.values()))


@pytest.mark.parametrize(
    "given", [1.5, True, "2", [1, 2], [1, "a", 1], {1: 1.5}, {1: None}, {9: 1}]
)
def test_numbers_that_are_none_are_refused(case: Case, given: object) -> None:
    with pytest.raises(UserError, match=r"method.top_k="):
        Skip("listed", top_k=given).check(list(case.infos.values()))


def test_a_whole_run(job: Callable[..., Outcome]) -> None:
    done = job("method=skip", "method.rule=ratio", "eval=perplexity", "finetune=none")
    assert done.code == 0, done.text
    report = done.report
    assert 1 <= report["compressed/eval/routing/top_k"] < report["dense/eval/routing/top_k"]
    names = ("active_parameters", "expert_flops", "distinct_experts_16")
    for name in names:
        key = f"eval/routing/{name}"
        assert report[f"compressed/{key}"] < report[f"dense/{key}"]
    assert report["compressed/kl"] > 0 and not report["compressed/stock"]
    assert report["compressed/form"] == "own form, skipped experts"
    refused = job("method=skip", "method.rule=naee", "method.mass=0.5")
    assert refused.code == 2
    assert "method.mass=0.5 is no option of method.rule=naee" in refused.text
