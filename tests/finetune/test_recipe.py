"""Recipes and their phases: rates, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import pytest
from trainings import recipe_of

from moe_lab.finetune.experts import Experts
from moe_lab.finetune.recipe import Phase, Recipe
from moe_lab.finetune.seer import Seer
from moe_lab.option import Option
from moe_lab.types import UserError


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 1.0])
def test_a_warm_up_warms_up(schedule: str, ratio: float) -> None:
    """The reference implementation asks for one and never gets it: the rate starts at its peak."""
    phase, num_steps = Phase(None, schedule=schedule, warmup_ratio=ratio), 40
    rates = [phase.rate(step, num_steps) for step in range(num_steps)]
    warmup = round(ratio * num_steps)
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    rest = rates[max(1, warmup) :]
    assert max(rates) == 1 and min(rates) > 0
    assert rest == sorted(rest, reverse=True)
    half = warmup + (num_steps - warmup) // 2
    if ratio < 1:
        assert phase.rate(half, num_steps) == pytest.approx(
            1 if schedule == "constant" else 0.5, abs=0.03
        )
        quarter = phase.rate(warmup + (num_steps - warmup) // 4, num_steps)
        expected = {"linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2, "constant": 1}
        assert quarter == pytest.approx(expected[schedule], abs=0.03)


WRONG = {
    "epochs": ({"epochs": 0}, r"finetune.phases.lm.epochs=0: .* at least 1"),
    "batch": ({"batch_size": -2}, r"finetune.phases.lm.batch_size=-2: .* at least 1"),
    "accumulation": ({"gradient_accumulation": 0}, r"phases.lm.gradient_accumulation=0"),
    "rate": ({"learning_rate": 0.0}, r"finetune.phases.lm.learning_rate=0.0: .* above 0"),
    "schedule": ({"schedule": "step"}, r"schedule=step: there are linear, cosine, constant"),
    "warm-up": ({"warmup_ratio": 1.5}, r"warmup_ratio=1.5: .* from 0 to 1"),
    "decay": ({"weight_decay": -1.0}, r"weight_decay=-1.0: .* at least 0"),
    "clip": ({"gradient_clip": 0.0}, r"finetune.gradient_clip=0.0: .* above 0"),
    "validation": ({"validate_every": 0}, r"finetune.validate_every=0: .* at least 1"),
    "dtype": ({"dtype": "int8"}, r"finetune.dtype=int8: there are float32, bfloat16"),
    "nothing": ({"experts": False}, r"trains nothing.*finetune=none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_recipes_are_refused(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        recipe_of(**changes)


@pytest.mark.parametrize("phases", [{}, None, {"lm": None}])
def test_a_recipe_without_phases_is_refused(phases: dict | None) -> None:
    with pytest.raises(UserError, match=r"finetune.phases is empty.*finetune=none"):
        Experts(phases=phases)


@dataclass(frozen=True)
class Own(Recipe):
    """A recipe as one's own code has it: what it does not say, the base says."""

    depth: Annotated[int, Option("how deep", least=1)] = 1


def test_a_recipe_needs_not_say_more_than_its_options() -> None:
    recipe = Own({"lm": Phase(None)})
    assert (recipe.needs_edits, recipe.distils) == (True, False)
    assert (recipe.twins, recipe.final_top_k) == (0.0, None)
    seer = Seer({"lm": Phase(None)}, top_k=2, twins=0.5)
    assert (seer.needs_edits, seer.twins, seer.final_top_k) == (False, 0.5, 2)


def test_a_report_tells_what_the_recipe_itself_declares() -> None:
    options = {"_target_": "a", "depth": None, "dtype": "float32", "phases": {}, "unknown": 3}
    assert Own.settings(options) == {"depth": None}
    given = {"temperature": 2.0, "experts": True, "validate_every": 3, "phases": {"lm": {}}}
    assert Experts.settings(given) == {"temperature": 2.0, "experts": True}


def test_where_text_comes_from_is_not_what_a_result_depends_on() -> None:
    lm = {"data": {"files": ["a"]}, "validation": None, "epochs": 2}
    options = {"depth": 1, "phases": {"lm": lm, "sft": None}}
    kept = Own({"lm": Phase(None)}).identity(options)
    assert kept == {"depth": 1, "phases": {"lm": {"epochs": 2}, "sft": None}}
    assert options["phases"]["lm"] is lm and "data" in lm, "what was given stays as it is"


def test_a_phase_can_be_left_out() -> None:
    assert list(Experts(phases={"lm": None, "sft": Phase(None)}).phases) == ["sft"]
