"""How many experts stay in each layer, when layers share a budget or a share of the score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from families import tiny_batch, tiny_model

from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios import budget
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.budget import Scores, floor_of
from moe_lab.methods.ratios.coverage import Coverage
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.layers import check_kept
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, Plan, UserError


def layer(index: int, num_experts: int = 4, **more: int) -> LayerInfo:
    return LayerInfo(index, f"model.layers.{index}.mlp", num_experts, **({"top_k": 1} | more),
                     hidden_size=2)  # fmt: skip


def rows(*scores: list[float], **more: int) -> list[tuple[LayerInfo, torch.Tensor]]:
    return [
        (layer(index, len(row), **more), torch.tensor(row).double())
        for index, row in enumerate(scores, start=1)
    ]


def keep(ratio: Any, scores: Scores) -> dict[int, tuple[int, ...]]:
    """Which experts stay by a ratio that looks at nothing but the scores."""
    return budget.kept(scores, ratio.numbers(scores, Profile([])))


def notes(ratio: Any, scores: Scores) -> dict[str, Any]:
    return ratio.notes(scores, ratio.numbers(scores, Profile([])))


ABOVE = ([9.0, 8, 7, 6], [5.0, 4, 3, 2], [1.0, 0.5, 0.25, 0])


def test_global_ranks_the_experts_of_all_layers_together() -> None:
    scores = rows([1.0, 9, 2, 8], [7.0, 3, 6, 4])
    assert keep(Global(0.25), scores) == {1: (1, 3), 2: (0, 1, 2, 3)}
    assert keep(Global(0.5), scores) == {1: (1, 3), 2: (0, 2)}
    assert keep(Global(0.0), scores) == {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}
    assert notes(Global(0.5), scores) == {"kept_per_layer": {"1": 2, "2": 2}, "floor_changed": {}}


def test_global_breaks_ties_by_layer_then_expert() -> None:
    assert keep(Global(0.25), rows([1.0] * 4, [1.0] * 4)) == {1: (0, 1, 2, 3), 2: (0, 1)}


def test_the_floor_is_paid_by_the_lowest_ranked_of_the_others() -> None:
    scores = rows(*ABOVE, top_k=2)
    assert keep(Global(0.5), scores) == {1: (0, 1), 2: (0, 1), 3: (0, 1)}
    assert notes(Global(0.5), scores) == {
        "kept_per_layer": {"1": 2, "2": 2, "3": 2},
        "floor_changed": {"1": {"without": 4, "with": 2}, "3": {"without": 0, "with": 2}},
    }
    scores = rows(*ABOVE, top_k=1)
    assert keep(Global(0.5), scores) == {1: (0, 1, 2, 3), 2: (0,), 3: (0,)}
    assert notes(Global(0.5), scores)["floor_changed"] == {
        "2": {"without": 2, "with": 1}, "3": {"without": 0, "with": 1}
    }  # fmt: skip
    assert keep(Global(0.25, floor=3), scores) == {1: (0, 1, 2), 2: (0, 1, 2), 3: (0, 1, 2)}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("floor", [None, 2, 3])
def test_the_total_is_as_asked_whatever_the_floor(ratio: float, floor: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        rank = 10 ** torch.rand(5, 1, generator=generator)
        scores = rows(*(rank * torch.rand(5, 8, generator=generator)).tolist(), top_k=2)
        chosen = Global(ratio, floor)
        chosen.check([info for info, _ in scores])
        kept = keep(chosen, scores)
        assert sum(map(len, kept.values())) == 40 - round(40 * ratio)
        assert min(map(len, kept.values())) >= (floor or 2)
        for info, score in scores:  # the best of each layer
            inside = score[list(kept[info.index])].min()
            outside = [score[e] for e in range(8) if e not in kept[info.index]]
            assert all(value <= inside for value in outside)


def test_groups_lose_one_expert_each() -> None:
    grouped = {"groups": 2, "groups_used": 1, "top_k": 2}
    scores = rows([9.0, 8, 7, 0, 1, 2, 3, 4], [5.0, 5, 5, 5, 5, 5, 5, 5], **grouped)
    # Units of the first layer by mean: (9+4)/2, (8+3)/2, (7+2)/2, (0+1)/2; of the second all 5.
    assert keep(Global(0.25), scores) == {1: (0, 1, 6, 7), 2: tuple(range(8))}
    kept = keep(Global(0.4), scores)  # 6.4 of 16, in units of 2: 6 go
    assert sum(map(len, kept.values())) == 10
    for info, _ in scores:
        check_kept(info, len(kept[info.index]))
        assert sum(e < 4 for e in kept[info.index]) == len(kept[info.index]) / 2
    assert keep(Coverage(0.5), scores)[1] == (0, 1, 6, 7)
    with pytest.raises(UserError, match=r"ratio.floor=5 .*groups"):
        Global(0.25, floor=5).check([info for info, _ in scores])


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_the_floor_is_the_fewest_that_a_router_works_with(
    groups: tuple[int, int], top_k: int
) -> None:
    info = layer(1, 16, top_k=top_k, groups=groups[0], groups_used=groups[1])

    def works(number: int) -> bool:
        try:
            check_kept(info, number)
        except UserError:
            return False
        return True

    assert floor_of(info, None) == next(number for number in range(1, 17) if works(number))


def test_impossible_requests_are_refused_with_the_numbers() -> None:
    layers = [layer(index, 8, top_k=2) for index in (1, 2, 3)]
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"at least 0, below 1"):
            Global(ratio).check(layers)
    Global(0.75).check(layers)
    with pytest.raises(
        UserError, match=r"0\.8 is too much: 5 of 24.* 6 together .*routers need.*0\.75"
    ):
        Global(0.8).check(layers)
    with pytest.raises(UserError, match=r"0\.5 is too much: 12 of 24.*15 .*ratio.floor.*0\.375"):
        Global(0.5, floor=5).check(layers)
    for ratio in (Global(0.25, floor=9), Coverage(0.9, floor=9)):
        with pytest.raises(UserError, match=r"ratio.floor=9: layer 1 has only 8"):
            ratio.check(layers)
    for ratio in (Global(0.25, floor=1), Coverage(0.9, floor=1)):
        with pytest.raises(UserError, match=r"ratio.floor=1 .*1 of 8.*chooses 2.*floor=null"):
            ratio.check(layers)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(UserError, match="above 0"):
            Coverage(share).check(layers)
    with pytest.raises(UserError, match=r"below 0.*metric=frequency"):
        keep(Coverage(0.9), rows([1.0, -1, 2, 3]))


def test_coverage_keeps_the_fewest_that_reach_it() -> None:
    scores = rows([5.0, 1, 3, 1], [0.0, 10, 0, 0], [0.0, 0, 0, 0])
    assert keep(Coverage(0.8), scores) == {1: (0, 2), 2: (1,), 3: (0,)}
    assert keep(Coverage(0.81), scores)[1] == (0, 1, 2)
    assert keep(Coverage(1.0), scores) == {1: (0, 1, 2, 3), 2: (1,), 3: (0,)}
    assert keep(Coverage(0.1, floor=2), scores) == {1: (0, 2), 2: (0, 1), 3: (0, 1)}
    assert notes(Coverage(0.8), scores) == {
        "kept_per_layer": {"1": 2, "2": 1, "3": 1},
        "covered": {"1": 0.8, "2": 1.0, "3": 1.0},
    }


def test_notes_go_into_the_plan() -> None:
    statistics = collect_statistics(tiny_model("qwen2_moe"), [tiny_batch()], only_routers=True)
    profile = Profile(statistics)
    made = Prune(soft_count, Global(0.25)).plan(profile)
    assert made.notes["kept_per_layer"] == {str(e.index): len(e.kept) for e in made.edits}
    assert sum(len(edit.kept) for edit in made.edits) == 18
    assert "kept_per_layer" not in Prune(soft_count, Uniform(0.25)).plan(profile).notes


def test_a_reference_enters_a_plan_by_its_content() -> None:
    class Referring:
        fingerprint = "0123"

    options = {"metric": {"_target_": "x", "reference": "/home/a"}, "ratio": {"ratio": 0.25}}
    found = Prune(Referring(), Uniform(0.25)).identity(options)
    assert found == {
        "metric": {"_target_": "x", "fingerprint": "0123"}, "ratio": {"ratio": 0.25}
    }  # fmt: skip
    assert Prune(soft_count, Uniform(0.25)).identity(options) == options


def test_a_job_with_one_budget_for_all_layers(job: Callable[..., Outcome], tmp_path: Path) -> None:
    done = job("ratio=global", "metric=soft_count", "compute.profile=routers")
    assert done.code == 0, done.text
    plans = list(done.store.glob("plan/*/plan.json"))
    notes = json.loads(plans[0].read_text())
    numbers = [len(edit["kept"]) for edit in notes["layers"]]
    assert sum(numbers) == 18 and list(notes["kept_per_layer"].values()) == numbers


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


def test_a_job_that_needs_more_than_the_routers_is_refused(job: Callable[..., Outcome]) -> None:
    done = job("metric=reap", "compute.profile=routers")
    words = ("compute.profile=routers", "frequency", "soft_count", "compute.profile=all")
    assert done.code == 2 and all(word in done.text for word in words), done.text
    assert done.stages() == []


def test_jobs_of_a_sweep_can_be_told_apart(job: Callable[..., Outcome]) -> None:
    """What a sweep is over stands in each report, also of a job that is refused."""
    wrong = ["calibration.group_by=domain", "calibration.group=code", "calibration.pack=true"]
    report = job("ratio=coverage", "ratio.coverage=0.8", "ratio.floor=4", *wrong).report
    assert report["status"] == "failed" and report["ratio_method"] == "coverage"
    assert (report["ratio/coverage"], report["ratio/floor"]) == (0.8, 4)
    assert (report["calibration/group_by"], report["calibration/group"]) == ("domain", "code")
