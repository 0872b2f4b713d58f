"""Criteria by gradients share one pass."""

from __future__ import annotations

import pytest
from expert_sets import Case
from neuron_pairs import profile_of, without_model

from moe_lab.methods.metrics.fisher import Fisher
from moe_lab.methods.metrics.heapr import Heapr
from moe_lab.types import UserError


def test_one_pass_answers_all() -> None:
    opened = []
    case = Case("mixtral")
    profile = profile_of(case)
    counted = without_model(profile)
    object.__setattr__(counted, "open_stream", lambda number=None: opened.append(number) or (
        profile.open_stream(number)))  # fmt: skip
    Heapr().neuron_scores(counted)
    Fisher().neuron_scores(counted)
    Fisher(over="tokens").neuron_scores(counted)
    Heapr(samples=7, seed=3).neuron_scores(counted)  # which draws nothing
    assert opened == [None]
    Heapr(num_samples=2).neuron_scores(counted)
    Heapr(labels="sampled", samples=1).neuron_scores(counted)
    Heapr(labels="sampled", samples=2).neuron_scores(counted)
    assert len(opened) == 4


def test_values_out_of_range() -> None:
    case = Case("mixtral")
    layers = list(case.infos.values())
    with pytest.raises(UserError, match=r"metric.labels=none: there are text, sampled"):
        Heapr(labels="none").check(layers)
    with pytest.raises(UserError, match=r"metric.samples=0: it must be at least 1"):
        Heapr(labels="sampled", samples=0).check(layers)
