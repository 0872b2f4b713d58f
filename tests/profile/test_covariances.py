"""Sums over what goes into the experts' matrices, against the routing written out."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch, tiny_model
from refits import layer_of

from moe_lab.models.factorized import stacked
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.covariances import ExpertInputs
from moe_lab.profile.profile import Profile
from moe_lab.types import NotFinite

BATCHES = [tiny_batch(seed=0), tiny_batch(seed=1)]


def profile_of(model) -> Profile:
    return Profile([], lambda number=None: LayerStream(model, BATCHES[:number]))


def by_hand(model, index: int, gated: bool) -> list[torch.Tensor]:
    """count [E], inputs [E, D, D] and hidden [E, I, I], token by token."""
    layer, caught = layer_of(model, index), []
    handle = layer.experts.register_forward_pre_hook(lambda module, args: caught.append(args))
    gate, up, _ = stacked(layer.experts).values()
    count, inputs, hidden = torch.zeros(8), torch.zeros(8, 32, 32), torch.zeros(8, 16, 16)
    for batch in BATCHES:
        model(**batch)
        x_TD, index_TK, weight_TK = caught.pop()
        for token in batch["attention_mask"].bool().flatten().nonzero()[:, 0].tolist():
            for expert, weight in zip(index_TK[token].tolist(), weight_TK[token], strict=True):
                x = x_TD[token]
                h = layer.experts.act_fn(gate[expert] @ x) * (up[expert] @ x)
                share = weight**2 if gated else 1.0
                count[expert] += 1
                inputs[expert] += share * torch.outer(x, x)
                hidden[expert] += share * torch.outer(h, h)
    handle.remove()
    return [count, inputs, hidden]


@torch.no_grad()
@pytest.mark.parametrize(("family", "gated"), [("qwen2_moe", False), ("deepseek_v3", True)])
def test_the_sums_are_those_of_the_routed_tokens(family: str, gated: bool) -> None:
    model = tiny_model(family)
    found, indices = ExpertInputs(profile_of(model), None, gated), [1, 3]  # one may be left out
    for index in indices:
        sums = found.of(index)
        for value, expected in zip(
            (sums.count, sums.inputs, sums.hidden), by_hand(model, index, gated), strict=True
        ):
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-4)


def test_values_that_are_not_finite_are_refused() -> None:
    model = tiny_model("mixtral")
    layer = moe_layers(model)[0]
    layer.experts.gate_up_proj.data[:, 0] = torch.inf
    with pytest.raises(NotFinite, match="layer 0"):
        ExpertInputs(profile_of(model), None).of(0)
