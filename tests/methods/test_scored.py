"""What methods of a metric and a ratio have in common."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch, tiny_model

from moe_lab.methods.dern import Dern
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.unified import Unified
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.methods.scored import ByScores, protected_experts
from moe_lab.models.layers import moe_layers
from moe_lab.profile.collect import collect_statistics, super_experts


@pytest.mark.parametrize("method", [Prune, Dern])
def test_what_decides_is_what_metric_and_ratio_say(method: type[ByScores]) -> None:
    """A ratio that is not used, such as one beside a target, is no part of an identity."""
    made = method(Unified(), Uniform(0.25, target_gib=1.0))
    options = {
        "metric": {"mean": True}, "ratio": {"ratio": 0.25, "of": "experts", "target_gib": 1.0},
        "mtp": "keep",
    }  # fmt: skip
    expected = {"metric": {"mean": True}, "ratio": {"target_gib": 1.0}, "mtp": "keep"}
    assert made.identity(options) == expected
    assert method.groups({}) == ("metric", "ratio")
    assert method(reap, Uniform(0.25))._metric.title == "the metric reap"


def test_protected_experts_are_the_models_extreme_ones() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        moe_layers(model)[3].experts.down_proj[2] *= 1e4  # in the last quarter of the layers
    statistics = collect_statistics(model, [tiny_batch()])
    found = {
        kind: protected_experts(kind, statistics) for kind in (None, "super_experts", "outliers")
    }
    assert found[None] == {}
    assert found["super_experts"] == super_experts(statistics)
    assert found["outliers"] == super_experts(statistics, include_last=True)
    assert found["super_experts"][3] == () != found["outliers"][3]
