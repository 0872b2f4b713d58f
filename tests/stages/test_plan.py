"""The stage of planning: a plan for each group, searches that are shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from running import Outcome

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.stages.context import Context
from moe_lab.stages.plan import IntactModel, Planning, check_numbers, copy_plan
from moe_lab.store import Store
from moe_lab.types import UserError

BY_GROUP = ["calibration.group_by=subject", "metric=frequency", "ratio.ratio=0.5"]


@pytest.fixture
def subjects(tmp_path: Path) -> list[str]:
    """Options for a calibration set whose rows name their subject."""
    path = tmp_path / "subjects.jsonl"
    texts = {"digits": "0123456789 " * 3, "letters": "the quick brown fox jumps "}
    rows = [{"text": f"{n} {texts[name]}", "subject": name} for n in range(4) for name in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"calibration.files=[{path}]"]


def test_each_group_has_a_plan(
    job: Callable[..., Outcome], subjects: list[str], tmp_path: Path
) -> None:
    done = job(*subjects, *BY_GROUP)
    assert done.code == 0, done.text
    (folder,) = done.store.glob("plan/*/")
    common = Plan.load(folder / "plan.json")
    assert common.notes["groups"] == ["digits", "letters"] and not common.edited()
    plans = [Plan.load(folder / "plans" / f"{number}.json") for number in (0, 1)]
    for number, name in enumerate(common.notes["groups"]):
        alone = job(*subjects, *BY_GROUP, f"calibration.group={name}", "calibration.num_samples=4")
        assert alone.code == 0, alone.text
        kept = [json.loads(file.read_text()) for file in done.store.glob("plan/*/plan.json")]
        assert [edit.kept for edit in plans[number].edits] in [
            [tuple(edit.get("kept", ())) for edit in plan["layers"]] for plan in kept
        ]
    assert [edit.kept for edit in plans[0].edits] != [edit.kept for edit in plans[1].edits]
    assert not (folder / "plans" / "2.json").exists()


def test_each_group_may_have_hidden_units_of_its_own(
    job: Callable[..., Outcome], subjects: list[str]
) -> None:
    done = job(*subjects, *BY_GROUP[:1], "metric=energy", "method.unit=neurons", "ratio.ratio=0.5")
    assert done.code == 0, done.text
    (folder,) = done.store.glob("plan/*/plans")
    one, other = (Plan.load(folder / f"{number}.json") for number in (0, 1))
    assert {edit.widths for edit in (*one.edits, *other.edits)} == {(8,)}
    name = f"layers.{one.edits[0].index}.neurons"
    assert not torch.equal(one.tensors[name], other.tensors[name])
    assert done.report["plan/ratio"] == 0.5


def test_groups_are_for_pruning_alone(job: Callable[..., Outcome], subjects: list[str]) -> None:
    for wrong, words in (
        (
            ["method=merge", "method.num_experts=4"],
            ["group_by=subject", "only method=prune", "calibration.group=<value>"],
        ),
        (["method=none"], ["only method=prune"]),
        (["finetune=experts"], ["no checkpoint that could be fine-tuned", "finetune=none"]),
        (["eval=tiny", "eval.top_k=[1]"], ["own number of experts", "leave out eval.top_k"]),
        (["calibration.group_by=topic"], ["group_by=topic", "subject"]),
    ):
        done = job(*subjects, *BY_GROUP[:1], *wrong)
        assert done.code == 2 and all(word in done.text for word in words), done.text
        assert done.stages() == []


def test_ways_to_choose_layers_share_what_was_searched(job: Callable[..., Outcome]) -> None:
    asked = []
    for layers in ("greedy_js", "one_shot_local", "greedy_js"):
        outcome = job("method=condense", f"condense.layers={layers}")
        assert outcome.code == 0, outcome.text
        asked.append(len(list((outcome.store / "search").glob("*/answer.json"))))
    # The experts of three layers and a step of the order; then one question more; then none.
    assert asked == [4, 5, 5]


def test_plans_share_what_a_pass_backwards_found(job: Callable[..., Outcome]) -> None:
    """One answer for both criteria and all budgets, in tensors; other labels are another one."""
    gradients, answers = ["method.unit=neurons", "metric.num_samples=4"], []
    for options in (
        ["metric=heapr", "ratio.ratio=0.5"],
        ["metric=heapr", "ratio=global", "ratio.ratio=0.25", "metric.seed=3"],
        ["metric=fisher", "ratio.ratio=0.25"],
        ["metric=heapr", "metric.labels=sampled", "metric.samples=2"],
    ):
        done = job(*gradients, *options)
        assert done.code == 0, done.text
        answers.append(len(list((done.store / "search").glob("*/answer.safetensors"))))
    assert answers == [1, 1, 1, 2]


def test_samples_stand_where_they_stand_in_the_calibration_set(tmp_path: Path) -> None:
    """Whatever their order in batches, which is by length."""
    tokens = Tokens(((5, 6, 7, 8), (5, 6), (5, 6, 7)), pad_id=0)
    folder = tmp_path / "model"
    tiny_model("mixtral").save_pretrained(folder)
    context = Context(Store(tmp_path / "store"), Compute(batch_size=2, device="cpu"))
    asked = Planning(Checkpoint(folder), None, tokens, None, {})
    stream = IntactModel(context, asked).open_stream()
    lengths = [int(row.sum()) for valid in stream.valid for row in valid]
    assert (stream.positions, lengths) == ([1, 2, 0], [2, 3, 4])
    stream = IntactModel(context, asked).open_stream(documents=[2, 4, 0], added=[[5], [9, 8]])
    rows = [ids[: int(v.sum())].tolist() for ids, v in zip(
        [row for batch in stream.input_ids for row in batch],
        [row for valid in stream.valid for row in valid], strict=True)]  # fmt: skip
    assert (stream.positions, rows) == ([4, 2, 0], [[9, 8], [5, 6, 7], [5, 6, 7, 8]])
    every = IntactModel(context, asked).open_stream(added=[[5], [9, 8]])
    assert sorted(every.positions) == [0, 1, 2, 3, 4]


def test_another_ratio_takes_what_was_measured_from_the_store(
    job: Callable[..., Outcome],
) -> None:
    searched, plans = [], []
    for ratio in (0.25, 0.5):
        done = job("method.unit=neurons", "metric=obs", f"ratio.ratio={ratio}")
        assert done.code == 0, done.text
        searched.append({path.parent.name for path in (done.store / "search").glob("*/answer.*")})
        plans.append({path.parent.name for path in (done.store / "plan").glob("*/plan.json")})
    assert searched[0] and searched[0] == searched[1]
    assert any((done.store / "search").glob("*/answer.safetensors"))
    [new] = plans[1] - plans[0]
    made = Plan.load(done.store / "plan" / new / "plan.json")
    assert all(edit.to_json()["refitted"] for edit in made.edits)
    assert {f"layers.{edit.index}.down_proj" for edit in made.edits} <= made.tensors.keys()


def test_a_plan_comes_into_the_run_s_folder_with_all_that_it_needs(tmp_path: Path) -> None:
    constants = torch.ones(4, 32)
    edit = PruneExperts(1, "model.layers.1.mlp", (0, 1, 2, 3), "constant")
    common = Plan((KeepLayer(1, "model.layers.1.mlp"),), notes={"statistics": "intact model"})
    alone = Plan((edit,), tensors={"layers.1.constants": constants})

    def write(folder: Path) -> None:
        (folder / "plan.json").write_text(common.to_text())
        (folder / "plans").mkdir()
        (folder / "plans" / "0.json").write_text(alone.to_text())

    def write_alone(folder: Path) -> None:
        (folder / "plan.json").write_text(alone.to_text())
        alone.write_tensors(folder / "plan.json")

    store = Store(tmp_path / "store")
    for name in ("grouped", "alone"):
        (tmp_path / name).mkdir()
    assert copy_plan(store.get("plan", {"a": 1}, write), tmp_path / "grouped") == common
    assert Plan.load(tmp_path / "grouped" / "plan.json") == common
    assert Plan.load(tmp_path / "grouped" / "plans" / "0.json") == alone
    copied = copy_plan(store.get("plan", {"a": 2}, write_alone), tmp_path / "alone")
    assert copied == alone and torch.equal(copied.tensors["layers.1.constants"], constants)
    assert copy_plan(store.get("plan", {"a": 1}, write), tmp_path / "alone").tensors == {}


@pytest.mark.parametrize(
    ("options", "key", "given", "row"),
    [
        (["ratio.ratio=0.3"], "plan/ratio", 0.25, ["share removed, asked 30.0 %", "25.0 %"]),
        (["ratio.ratio=0.3", "ratio.round_to=4"], "plan/ratio", 0.5,
         ["share removed, asked 30.0 %", "50.0 %"]),
        (["ratio=global", "ratio.ratio=0.3"], "plan/ratio", 7 / 24,
         ["share removed, asked 30.0 %", "29.2 %"]),
        (["method=merge", "ratio.ratio=0.3"], "plan/ratio", 0.25,
         ["share removed, asked 30.0 %", "25.0 %"]),
        (["ratio.ratio=0.25"], "plan/ratio", 0.25, None),
        (["ratio.ratio=0"], "plan/ratio", 0.0, None),
        (["ratio=listed", "ratio.kept=[6,7,8]"], "plan/ratio", 3 / 24, None),
        (["ratio.target_gib=0.00029"], "plan/target_gib", None, ["GiB of weights, asked 0.00029"]),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_told_beside_what_is_given(
    job: Callable[..., Outcome], caplog: pytest.LogCaptureFixture, options: list[str], key: str,
    given: float | None, row: list[str] | None,
) -> None:  # fmt: skip
    """In the report, in the table, and once in the log; also where the plan was there before."""
    job("metric=frequency", *options)
    with caplog.at_level("INFO"):
        done = job("metric=frequency", *options)
    assert done.code == 0, done.text
    assert done.report["cached/plan"]
    if given is not None:
        assert done.report[key] == pytest.approx(given)
    else:
        assert 0.9 * 0.00029 < done.report[key] <= 0.00029
    said = [line for line in caplog.messages if line.startswith("asked for ratio.")]
    assert len(said) == (row is not None)
    shown = [line for line in done.text.splitlines() if ", asked" in line and "│" in line]
    assert len(shown) == (row is not None)
    assert all(word in shown[0] for word in row or ())
    nothing = [line for line in caplog.messages if line.startswith("no expert goes")]
    assert len(nothing) == (given == 0)


def test_groups_tell_the_mean_of_their_plans(
    job: Callable[..., Outcome], subjects: list[str]
) -> None:
    done = job(*subjects, *BY_GROUP[:2], "ratio.ratio=0.4")
    assert done.report["plan/ratio"] == 0.375, "3 of 8, in each layer of each group"


def test_fewer_samples_than_a_search_asks_for_are_said_once(
    job: Callable[..., Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        job("metric=leave_one_out", "metric.num_samples=500", "diagnose=full",
            "diagnose.num_samples=300", "diagnose.weights=false")  # fmt: skip
    said = [line for line in caplog.messages if line.startswith("asked for ") and "sample" in line]
    assert sorted(said) == [
        "asked for diagnose.num_samples=300, given all 8 calibration samples",
        "asked for the first 500 calibration samples, given all 8 that there are "
        "(calibration.num_samples)",
    ]


@pytest.mark.parametrize(
    ("number", "place"),
    [
        (dict(scores=(0.0, float("nan"))), r"layer 1: scores\[1\] of the plan is not finite"),
        (dict(notes={"curve": {"3": [1.0, float("inf")]}}), r"the plan's notes: curve\.3\[1\]"),
        (dict(divergence=(float("inf"),)), r"the choice of layers: divergence\[0\]"),
        (dict(tensors={"layers.1.constants": torch.tensor([[1.0, float("nan")]])}),
         r"the plan's tensors: layers\.1\.constants"),
    ],
)  # fmt: skip
def test_a_plan_with_a_number_that_is_none_is_refused(number: dict[str, Any], place: str) -> None:
    edit = PruneExperts(1, "a", kept=(0,), scores=number.get("scores", (1.0, 0.0)))
    plan = Plan(
        (edit,), layer_order=(1,), layer_divergence=number.get("divergence", ()),
        notes=number.get("notes", {}), tensors=number.get("tensors", {}),
    )  # fmt: skip
    with pytest.raises(UserError, match=place):
        check_numbers(plan)
    check_numbers(Plan((PruneExperts(1, "a", kept=(0,), scores=(1.0, 0.0)),)))
