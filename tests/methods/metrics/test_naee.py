"""NAEE: the best of all subsets, and elimination, against copies that are pruned."""

from __future__ import annotations

import itertools
import logging

import pytest
from expert_sets import LAYER, Case, slow_error, slow_masked_error

from moe_lab.methods.metrics.naee import Naee, eliminated, num_eliminations, num_subsets, subsets
from moe_lab.models.stream import LayerStream
from moe_lab.profile.all_experts import AllExperts, ExpertSample, can_keep


def slow_greedy(case: Case, index: int) -> list[int]:
    """Backward elimination by pruning copies, one expert of each group in turn."""
    info = case.infos[index]
    slow = slow_error if info.groups == 1 else slow_masked_error
    kept, removed, size = list(range(8)), [], 8 // info.groups
    while len(kept) > (2 * info.groups if info.groups > 1 else info.top_k):
        done: list[int] = []
        while len(done) < info.groups:
            values = {}
            for gone in sorted(kept, reverse=True):
                if gone // size not in [expert // size for expert in done]:
                    values[gone] = slow(case, index, [e for e in kept if e != gone])[0]
            best = min(values, key=values.__getitem__)
            kept.remove(best)
            done.append(best)
        removed += done
    return removed


def test_naee_is_the_best_of_all_pruned_copies(case: Case) -> None:
    number = 6 if case.infos[LAYER].groups > 1 else 5
    numbers = dict.fromkeys(case.infos, number)
    metric = Naee()
    chosen = metric.choose(case.profile(), numbers)
    assert list(chosen) == list(case.infos)
    every = list(subsets(case.infos[LAYER], number))
    assert len(every) == num_subsets(case.infos[LAYER], number) == len(set(every))
    values = {kept: slow_error(case, LAYER, kept)[0] for kept in every}
    assert values[chosen[LAYER]] == min(values.values())
    legal = [c for c in itertools.combinations(range(8), number) if can_keep(case.infos[LAYER], c)]
    assert every == legal
    assert metric.notes(list(case.infos.values()), numbers)["naee"][str(LAYER)] == (
        f"exhaustive, {len(every)} subsets"
    )


def test_elimination_tries_as_many_subsets_as_it_says(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []
    errors = AllExperts.errors
    monkeypatch.setattr(
        AllExperts, "errors", lambda self, sets: tried.extend(sets) or errors(self, sets)
    )
    with ExpertSample(LayerStream(case.model, case.batches)).open(LAYER) as experts:
        with caplog.at_level(logging.INFO):
            eliminated(experts)
        assert len(tried) == num_eliminations(experts.info) > 8
    assert f"layer {LAYER}: one expert after another goes, by trying {len(tried)} " in caplog.text


def test_greedy_naee_is_the_slow_one(case: Case) -> None:
    metric = Naee(max_subsets=0)
    order = slow_greedy(case, LAYER)
    place = list(case.infos).index(LAYER)
    score = metric.scores(case.profile())[place]
    assert sorted(range(8), key=lambda e: (float(score[e]), e))[: len(order)] == order
    assert {float(score[e]) for e in range(8) if e not in order} == {float(len(order))}
    steps = case.infos[LAYER].groups
    for removed in range(0, len(order) + 1, steps):
        chosen = metric.choose(case.profile(), {LAYER: 8 - removed})
        assert chosen == {LAYER: tuple(e for e in range(8) if e not in order[:removed])}
    assert metric.notes([case.infos[LAYER]], {LAYER: 4})["naee"][str(LAYER)].startswith("greedy")
