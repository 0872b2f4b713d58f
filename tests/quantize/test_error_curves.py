"""Measured errors of experts and layers, against a model that is changed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny_batch, tiny_model
from slow_neurons import seen_by

from moe_lab.models.layers import moe_layers
from moe_lab.models.rounding import Scheme
from moe_lab.models.stream import LayerStream, States
from moe_lab.profile.routed_tokens import RoutedTokens
from moe_lab.quantize.column_rounding import LevelChoice
from moe_lab.quantize.error_curves import expert_errors, layer_errors
from moe_lab.quantize.expert_levels import expert_levels, put_levels

GIVEN = [LevelChoice(Scheme(2, 8)), LevelChoice(Scheme(4, 8))]


def test_of_an_expert_is_the_gated_change_of_its_outputs() -> None:
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    stream = LayerStream(model, [batch])
    states = States(stream)
    states.move_to(2)
    tokens = RoutedTokens(stream.moe[2], states)
    layer = stream.moe[2]
    levels = [expert_levels(layer, 4, one, None, torch.float32) for one in GIVEN]
    found = expert_errors(tokens, 4, tokens.of(4), levels)
    whole = [one for one in seen_by(model, batch) if (one.layer, one.expert) == (2, 4)]
    for error, one in zip(found, levels, strict=True):
        other = copy.deepcopy(model)
        put_levels(moe_layers(other)[1], 4, one)  # layer 0 is dense
        changed = [x for x in seen_by(other, batch) if (x.layer, x.expert) == (2, 4)]
        slow = sum(
            float((a.weight * (a.output - b.output)).square().sum())
            for a, b in zip(whole, changed, strict=True)
        )
        assert error == pytest.approx(slow / tokens.num_tokens / 32, rel=1e-3)
    assert found[0] > found[1] > 0


@pytest.mark.parametrize("weight", ["none", "output"])
def test_of_a_layer_is_the_change_of_what_leaves_it(weight: str) -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    stream, valid = LayerStream(model, [batch]), batch["attention_mask"].bool()
    states = States(stream)
    states.move_to(1)
    layer = stream.moe[1]
    tokens = RoutedTokens(layer, states, weight)
    candidate = [expert_levels(layer, e, GIVEN[0], None, torch.float32) for e in range(8)]
    [found] = layer_errors(tokens, states, [candidate], weight)
    before = stream.replay(1, 0, states[0])[valid].double()
    for expert, levels in enumerate(candidate):
        put_levels(layer, expert, levels)
    after = stream.replay(1, 0, states[0])[valid].double()
    error_T = (before - after).detach().square().mean(dim=1)
    if weight == "output":
        error_T /= before.detach().square().mean(dim=1)
    assert found == pytest.approx(float(error_T.mean()), rel=1e-3)
