"""What each expert gets, against a loop over tokens and experts."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch, tiny_model
from slow_neurons import seen_by

from moe_lab.models.stream import LayerStream, States
from moe_lab.profile.routed_tokens import NOTED_OF_TOKENS, RoutedTokens

BATCHES = [tiny_batch(0), tiny_batch(1)]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_experts_get_their_tokens_and_no_padding(family: str) -> None:
    model = tiny_model(family)
    stream = LayerStream(model, BATCHES)
    states = States(stream)
    states.move_to(2)
    tokens = RoutedTokens(stream.moe[2], states)
    first = int(BATCHES[0]["attention_mask"].sum())
    assert tokens.num_tokens == first + int(BATCHES[1]["attention_mask"].sum())
    for expert in range(8):
        seen = [
            one for batch in BATCHES for one in seen_by(model, batch)
            if (one.layer, one.expert) == (2, expert)
        ]  # fmt: skip
        given = tokens.of(expert)
        assert len(given.x_ND) == len(seen)
        if seen:
            expected = torch.stack([one.weight * one.output for one in seen]).float()
            torch.testing.assert_close(tokens.added(expert, given), expected, rtol=1e-3, atol=1e-4)
            hidden = torch.stack([one.hidden for one in seen]).float()
            torch.testing.assert_close(tokens.hidden(expert, given), hidden, rtol=1e-3, atol=1e-4)
    assert sum(len(tokens.of(e).row_N) for e in range(8)) == tokens.num_tokens * (
        stream.moe[2].info.top_k
    )
    tokens.close()
    with pytest.raises(KeyError):
        stream.cache["routed tokens", NOTED_OF_TOKENS[0], 0]


def test_tokens_weigh_by_the_state_that_leaves_the_layer() -> None:
    model = tiny_model("mixtral")
    stream = LayerStream(model, BATCHES)
    tokens = RoutedTokens(stream.moe[0], States(stream), "output")
    leaving = torch.cat([
        stream.replay(0, number, stream.cache["input", number])[batch["attention_mask"].bool()]
        for number, batch in enumerate(BATCHES)
    ])  # fmt: skip
    torch.testing.assert_close(tokens.weighs(), 1 / leaving.square().mean(dim=1))
