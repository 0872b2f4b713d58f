"""DERN: the experts that a metric and a ratio keep, and what is refused."""

from __future__ import annotations

import pytest
from expert_sets import Case

from moe_lab.methods.dern import Dern
from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.metrics.gate_sum import gate_sum
from moe_lab.methods.metrics.naee import Naee
from moe_lab.methods.metrics.random import Random
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.recombine import RecombineExperts
from moe_lab.types import UserError


def test_it_keeps_the_experts_that_pruning_keeps(case: Case) -> None:
    profile = case.profile()
    made = Dern(gate_sum, Uniform(0.5), threshold=0.3).plan(profile)
    pruned = Prune(gate_sum, Uniform(0.5)).plan(profile)
    for edit, other, layer in zip(made.edits, pruned.edits, profile.statistics, strict=True):
        assert isinstance(edit, RecombineExperts)
        assert (edit.index, edit.kept, edit.threshold) == (other.index, other.kept, 0.3)
        assert edit.scores == tuple(gate_sum(layer).tolist())
    assert made.notes == {name: pruned.notes[name] for name in made.notes}
    assert made.notes["given"]["ratio"] == 0.5


def test_what_is_known_before_any_work(case: Case) -> None:
    infos = list(case.infos.values())
    method = Dern(gate_sum, Uniform(0.5))
    method.check(infos)
    assert method.foreseen(infos) == dict.fromkeys(case.infos, 4)
    assert [edit.kept for edit in method.example(infos)] == [tuple(range(8))] * len(infos)
    assert method.from_routers and Dern.groups({}) == ("metric", "ratio")
    assert Dern(Random(0), Uniform(0.5)).identity({"metric": {"seed": 0}, "ratio": {"ratio": 0.5}})


@pytest.mark.parametrize("metric", [energy, Naee()])
def test_a_metric_without_scores_of_experts_is_refused(case: Case, metric: object) -> None:
    with pytest.raises(UserError, match=r"method=dern keeps experts by their scores, and the"):
        Dern(metric, Uniform(0.5)).check(list(case.infos.values()))  # type: ignore[arg-type]


def test_a_ratio_with_which_a_router_cannot_work_is_refused(case: Case) -> None:
    with pytest.raises(UserError, match="experts would stay"):
        Dern(gate_sum, Uniform(0.9)).check(list(case.infos.values()))
    with pytest.raises(UserError, match=r"method\.threshold=-2: it must be at least -1"):
        Dern(gate_sum, Uniform(0.5), threshold=-2).check(list(case.infos.values()))
