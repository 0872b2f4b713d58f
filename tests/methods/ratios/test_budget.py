"""Budgets: sizes in experts, parameters, bytes and GiB, multiples and floors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from edited_models import saved_bytes
from layer_scores import layer, numbers, scored, sized
from running import Outcome

from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.budget import GIB, Budget, Ratio, Scores, floor_of
from moe_lab.methods.ratios.evolutionary import Evolutionary
from moe_lab.methods.ratios.listed import Listed
from moe_lab.methods.ratios.sensitivity import Sensitivity
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import check_kept
from moe_lab.option import Option
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError


def test_shares_may_be_of_parameters_or_bytes() -> None:
    layers = [sized(1), sized(2)]  # 16 experts of 100 bytes in a model of 10,000
    assert numbers(Uniform(0.08, of="bytes"), layers) == [4, 4]
    assert numbers(Uniform(0.08, of="parameters"), layers) == [4, 4]
    assert numbers(Uniform(0.08), layers) == [7, 7]
    assert sum(numbers(Global(0.05, of="bytes"), layers)) == 11
    with pytest.raises(UserError, match=r"ratio.of=bytes is too much.*At most 0\.12 "):
        Uniform(0.13, of="bytes").check(layers)
    with pytest.raises(UserError, match=r"ratio.of=gib: .*experts, parameters, bytes"):
        Uniform(0.13, of="gib").check(layers)
    unequal = [sized(1), sized(2, expert_bytes=200)]
    with pytest.raises(UserError, match=r"\[100, 200\] bytes.*ratio.of=experts"):
        Global(0.05, of="bytes").check(unequal)
    Global(0.05).check(unequal)


@pytest.mark.parametrize("make", [Uniform, Global, Evolutionary, Sensitivity])
def test_a_target_is_met_from_below(make: type[Budget]) -> None:
    layers = [sized(1), sized(2), sized(3)]
    for size in range(8_200, 9_900, 37):
        budget = make(0.9, target_gib=size / GIB)
        budget.check(layers)
        if make is Uniform:
            kept, step = sum(budget.numbers(scored(layers), Profile([])).values()), 3
        else:
            kept, step = budget.total(layers), 1
        assert kept < 24 and 10_000 - 100 * (24 - kept) <= size
        assert 10_000 - 100 * (24 - kept - step) > size
    for size in (10_000, 20_000):
        with pytest.raises(UserError, match=r"removes nothing.*9\.314e-06 GiB now.*less than it"):
            make(0.5, target_gib=size / GIB).check(layers)
    least = 10_000 - 18 * 100
    message = r"target_gib=.* is too little.*The model has 9\.314e-06 GiB now.* as 7\.637e-06 GiB"
    with pytest.raises(UserError, match=message):
        make(0.5, target_gib=(least - 1) / GIB).check(layers)
    make(0.5, target_gib=least / GIB).check(layers)
    with pytest.raises(UserError, match=r"is too little: (layer 1: )?0 of"):
        make(0.5, target_gib=1 / GIB).check(layers)
    with pytest.raises(UserError, match="must be above 0"):
        make(0.5, target_gib=0.0).check(layers)


def test_what_a_target_replaces_is_no_part_of_the_identity() -> None:
    options = {"ratio": 0.25, "of": "experts", "target_gib": None, "round_to": 1}
    assert Uniform(0.25).identity(options) == options
    found = Uniform(0.25, target_gib=1.0).identity(options | {"target_gib": 1.0})
    assert found == {"target_gib": 1.0, "round_to": 1}


def test_every_layer_keeps_a_multiple() -> None:
    layers = [sized(index, 30) for index in range(4)]
    assert numbers(Uniform(0.25, round_to=8), layers) == [24] * 4  # 22.5: nearer than 16
    assert numbers(Uniform(0.4, round_to=8), layers) == [16] * 4  # 18
    assert numbers(Uniform(0.0, round_to=8), layers) == [24] * 4
    assert numbers(Uniform(0.9, round_to=8), layers) == [8] * 4  # 3 would stay: 0 is no floor
    assert (
        numbers(Uniform(0.5, target_gib=(10_000 - 4 * 800) / GIB, round_to=8), layers) == [16] * 4
    )
    with pytest.raises(UserError, match=r"0\.99 is too much.* 0 of 30"):
        Uniform(0.99, round_to=8).check(layers)
    for ratio in (0.25, 0.5):
        found = numbers(Global(ratio, round_to=4), layers)
        assert all(number % 4 == 0 for number in found)
        assert abs(sum(found) - 120 * (1 - ratio)) <= 2
    grouped = [sized(index, 16, groups=2, groups_used=1, top_k=3) for index in range(3)]
    assert set(numbers(Uniform(0.4, round_to=3), grouped)) == {12}  # 9.6: of 6 and 12
    assert all(number % 6 == 0 for number in numbers(Global(0.4, round_to=3), grouped))
    with pytest.raises(UserError, match=r"round_to=16: layer 1 keeps at least 2 of 8 .*of 16"):
        Global(0.25, round_to=16).check([sized(1)])
    with pytest.raises(UserError, match=r"round_to=0: .*at least 1"):
        Uniform(0.25, round_to=0).check([sized(1)])
    with pytest.raises(UserError, match=r"4 of 8 .*fewer than ratio.floor=5.*At most 0\.375"):
        Uniform(0.5, floor=5).check([sized(1)])


def test_a_job_within_a_memory_target(job: Callable[..., Outcome], checkpoint: Path) -> None:
    infos = Checkpoint(checkpoint, "float32").layers()
    target = infos[0].model_bytes - 5 * infos[0].expert_bytes  # 2 of each of 3 layers have to go
    done = job("metric=frequency", f"ratio.target_gib={target / GIB}")
    assert done.code == 0, done.text
    plan = Plan.load(next(done.store.glob("plan/*/plan.json")))
    assert [len(edit.kept) for edit in plan.edits] == [6, 6, 6]
    assert done.report["ratio"] is None and done.report["ratio/target_gib"] == target / GIB
    (folder,) = (path.parent for path in done.store.glob("compress/**/config.json"))
    tensors, files = saved_bytes(folder)
    assert files <= target < files + 3 * infos[0].expert_bytes
    assert tensors == saved_bytes(checkpoint)[0] - 6 * infos[0].expert_bytes
    refused = job("metric=frequency", "ratio=global", "ratio.target_gib=1e-6")
    assert refused.code == 2 and "can have as little as" in refused.text
    assert list(refused.store.glob("plan/*/plan.json")) == list(done.store.glob("plan/*/plan.json"))


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


def test_what_a_ratio_is_unless_it_says_so() -> None:
    @dataclass(frozen=True)
    class Keep(Ratio):
        number: Annotated[int, Option("how many stay", least=1)] = 2

        def numbers(self, scores: Scores, profile: Profile) -> dict[int, int]:
            return {info.index: self.number for info, _ in scores}

    ratio, layers = Keep(3), [layer(1), layer(2)]
    assert numbers(ratio, layers) == [3, 3]
    assert ratio.takes_groups and ratio.notes([], {}) == {}
    assert ratio.identity({"number": 3}) == {"number": 3}
    with pytest.raises(UserError, match=r"^ratio\.number=0: it must be at least 1$"):
        Keep(0).check(layers)
    assert not Evolutionary(0.5).takes_groups and not Sensitivity(0.5).takes_groups
    with pytest.raises(TypeError, match="abstract"):
        Budget(0.5)  # type: ignore[abstract]


NOTHING = {  # options, and what would do something
    "rounds to none": (dict(ratio=0.05), ["ratio.ratio=0.05 removes nothing: all 24 experts"]),
    "no such multiple": (
        dict(ratio=0.25, round_to=8),
        ["in multiples of ratio.round_to=8", "ratio.round_to=7 would remove 3 of them"],
    ),
    "too large a multiple": (
        dict(ratio=0.2, round_to=4),
        ["ratio.ratio=0.25 would remove 12", "or ratio.round_to=3 would remove 6"],
    ),
    "bytes": (dict(ratio=0.001, of="bytes"), ["ratio.ratio=0.001 ratio.of=bytes removes nothing"]),
    "parameters": (dict(ratio=0.001, of="parameters"), ["ratio.of=parameters removes nothing"]),
    "size": (
        dict(ratio=0.5, target_gib=1.0),
        ["ratio.target_gib=1.0 removes nothing", "less than"],
    ),
    "floor": (dict(ratio=0.3, floor=8), []),
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("make", [Uniform, Global, Evolutionary, Sensitivity])
def test_a_share_that_removes_nothing_is_refused_with_one_that_does(
    make: type[Budget], case: str
) -> None:
    """And what the message proposes is asked for then, and removes what it says."""
    layers = [sized(1), sized(2), sized(3)]
    options, words = NOTHING[case]
    budget = make(**options)
    if make is not Uniform and case in ("rounds to none", "too large a multiple"):
        budget = make(**(options | {"ratio": 0.02}))  # all layers together round less
        words = ["removes nothing: all 24 experts"]
    if make is not Uniform and case == "no such multiple":  # 16 of 24 would be one
        words = ["In multiples of 8 nothing can be removed", "ratio.round_to=7 would remove 3 of"]
    with pytest.raises(UserError) as raised:
        budget.check(layers)
    message = str(raised.value)
    assert all(word in message for word in words), message
    proposed = re.findall(r"ratio\.(ratio|round_to)=([\d.]+) would remove (\d+)", message)
    assert proposed or case in ("size", "floor"), message
    for name, value, number in proposed:
        value = int(value) if name == "round_to" else float(value)
        kept = (
            numbers(make(**(budget_options(budget) | {name: value})), layers)
            if (make in (Uniform, Global))
            else [make(**(budget_options(budget) | {name: value})).total(layers)]
        )
        assert 24 - sum(kept) == int(number) > 0, message


def budget_options(budget: Budget) -> dict[str, Any]:
    """What a budget was made with."""
    return {name: getattr(budget, name) for name in ("ratio", "of", "target_gib", "round_to")}


@pytest.mark.parametrize("make", [Uniform, Global, Evolutionary, Sensitivity])
def test_a_share_of_0_is_what_was_asked_for(make: type[Budget]) -> None:
    layers = [sized(1), sized(2)]
    make(0.0).check(layers)
    make(0.0, round_to=8).check(layers)
    assert make(0.0).told(layers, {1: 8, 2: 8})["given"]["ratio"] == 0


def test_what_is_given_is_told_in_the_unit_of_what_was_asked() -> None:
    layers, kept = [sized(1), sized(2)], {1: 6, 2: 5}  # 5 of 16 experts of 100 bytes
    told = Uniform(0.3).told(layers, kept)
    assert told == {"asked": {"ratio": 0.3}, "given": {"ratio": 5 / 16, "experts": "5 of 16"}}
    assert Uniform(0.3, of="bytes").told(layers, kept)["given"]["ratio"] == 500 / 10_000
    assert Uniform(0.3, of="parameters").told(layers, kept)["given"]["ratio"] == 250 / 5_000
    size = Uniform(0.3, target_gib=9_600 / GIB).told(layers, kept)
    assert size["asked"] == {"target_gib": 9_600 / GIB}
    assert size["given"] == {"target_gib": 9_500 / GIB, "experts": "5 of 16"}
    assert "asked" not in Listed(kept=[6, 5]).told(layers, kept)
