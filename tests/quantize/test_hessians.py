"""Hessians of experts and of linear layers, against sums over tokens."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch, tiny_model

from moe_lab.models.stream import LayerStream, States
from moe_lab.profile.routed_tokens import RoutedTokens
from moe_lab.quantize.hessians import expert_hessians, linear_hessians


def opened(index: int = 1) -> tuple[LayerStream, States]:
    stream = LayerStream(tiny_model("mixtral"), [tiny_batch(0), tiny_batch(1)])
    states = States(stream)
    states.move_to(index)
    return stream, states


@pytest.mark.parametrize("token_weight", ["none", "gate_squared"])
def test_of_an_expert_s_inputs_and_hidden_units(token_weight: str) -> None:
    stream, states = opened()
    tokens = RoutedTokens(stream.moe[1], states)
    given = tokens.of(3)
    hidden = tokens.hidden(3, given)
    found = expert_hessians(tokens, 3, token_weight, 1)
    assert found is not None
    for ours, x in zip(found, (given.x_ND, hidden), strict=True):
        weight = given.gate_N.double() ** 2 if token_weight != "none" else [1.0] * len(x)
        slow = sum(w * torch.outer(row, row) for w, row in zip(weight, x.double(), strict=True))
        torch.testing.assert_close(ours.double(), 2 / len(x) * slow, rtol=1e-4, atol=1e-6)
    assert expert_hessians(tokens, 3, token_weight, len(given.x_ND) + 1) is None


def test_of_linear_layers_without_padding() -> None:
    stream, states = opened()
    module = stream.layers[1].self_attn.q_proj
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in range(2):
        stream.replay(1, batch, states[batch])
    handle.remove()
    x = torch.cat([one[valid] for one, valid in zip(inputs, stream.valid, strict=True)])
    found = linear_hessians(states, 1, {"q": module, "unused": torch.nn.Linear(2, 2)})
    assert found.keys() == {"q"}
    torch.testing.assert_close(found["q"], x.T @ x * (2 / len(x)), rtol=1e-4, atol=1e-6)
