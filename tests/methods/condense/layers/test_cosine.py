"""Layers by the similarity of the states around them."""

from __future__ import annotations

import pytest
import torch
from condensing import brute_force_states, planned
from torch.nn import functional as F


def test_layers_by_cosine_similarity(measured) -> None:
    model, batches, _ = measured
    plan, stream = planned(measured, layers="cosine", num_layers=3, experts="frequency")
    similarities = []
    documents = brute_force_states(model, batches)
    model_states = {index: [(d[index], d[index + 1]) for d in documents] for index in (1, 2)}
    for index in (1, 2):  # the last layer's output is only known after the final norm
        pairs = [F.cosine_similarity(a, b, dim=-1) for a, b in model_states[index]]
        similarities.append(float(torch.cat(pairs).mean()))
    by_layer = dict(zip(plan.layer_order, plan.layer_divergence, strict=True))
    assert [1 - by_layer[index] for index in (1, 2)] == pytest.approx(similarities, rel=1e-9)
    assert list(plan.layer_divergence) == sorted(plan.layer_divergence)
    assert stream is None  # nothing but the profile is needed
