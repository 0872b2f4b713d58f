"""Models in float64 with what a search looks at, and the plan that was found."""

from __future__ import annotations

import functools

import pytest
from condensing import brute_force_states
from families import tiny_batch, tiny_model

from moe_lab.methods.condense.method import Condense
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile

FAMILIES = ["qwen2_moe", "deepseek_v2", "deepseek_v3", "mixtral", "gpt_oss"]


@pytest.fixture(params=FAMILIES)
def searched(request):
    return searched_in(request.param)


@functools.cache  # and not a fixture of the session, which would forget a family for the next
def searched_in(family: str):
    """A model in float64, its batches (with padding), statistics, intact states, and our plan."""
    model = tiny_model(family).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    batches = [tiny_batch(seed=seed) for seed in (0, 1)]
    found = collect_statistics(model, batches)
    method = Condense(num_layers=2, num_routed=3, experts="greedy_js", layers="greedy_js")
    plan = method.plan(Profile(found, lambda: LayerStream(model, batches)))
    statistics = {layer.info.index: layer for layer in found}
    return model, batches, statistics, brute_force_states(model, batches), plan


@pytest.fixture(scope="module")
def measured():
    """A model in float64 with three MoE layers after a dense one, batches and statistics."""
    model = tiny_model("qwen2_moe").double()
    model.set_experts_implementation("eager")
    batches = [tiny_batch(seed=seed) for seed in (0, 1, 2)]
    return model, batches, collect_statistics(model, batches)
