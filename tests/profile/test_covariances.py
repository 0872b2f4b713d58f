"""Sums over what goes into the experts' matrices, against the routing written out."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch, tiny_model
from refits import layer_of

from moe_lab.models.factorized import stacked
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.covariances import ExpertInputs
from moe_lab.profile.profile import Profile
from moe_lab.types import NotFinite

BATCHES = [tiny_batch(seed=0), tiny_batch(seed=1)]


def profile_of(model) -> Profile:
    statistics = collect_statistics(model, BATCHES)
    return Profile(statistics, lambda number=None: LayerStream(model, BATCHES[:number]))


def by_hand(model, index: int, gated: bool, token_weight: str = "none") -> list[torch.Tensor]:
    """count [E], inputs [E, D, D] and hidden [E, I, I], token by token."""
    layer, caught = layer_of(model, index), []
    handle = layer.experts.register_forward_pre_hook(lambda module, args: caught.append(args))
    left = []
    decoder = layer.decoder.register_forward_hook(lambda module, args, out: left.append(out))
    gate, up, _ = stacked(layer.experts).values()
    count, inputs, hidden = torch.zeros(8), torch.zeros(8, 32, 32), torch.zeros(8, 16, 16)
    for batch in BATCHES:
        model(**batch)
        x_TD, index_TK, weight_TK = caught.pop()
        state_TD = hidden_of(left.pop()).flatten(0, 1)
        for token in batch["attention_mask"].bool().flatten().nonzero()[:, 0].tolist():
            for expert, weight in zip(index_TK[token].tolist(), weight_TK[token], strict=True):
                x = x_TD[token]
                h = layer.experts.act_fn(gate[expert] @ x) * (up[expert] @ x)
                share = weight**2 if gated else 1.0
                if token_weight == "output":
                    share = share / state_TD[token].square().mean()
                count[expert] += 1
                inputs[expert] += share * torch.outer(x, x)
                hidden[expert] += share * torch.outer(h, h)
    handle.remove()
    decoder.remove()
    return [count, inputs, hidden]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "gated", "token_weight"),
    [("qwen2_moe", False, "none"), ("deepseek_v3", True, "none"), ("mixtral", True, "output")],
)
def test_the_sums_are_those_of_the_routed_tokens(
    family: str, gated: bool, token_weight: str
) -> None:
    model = tiny_model(family)
    found = ExpertInputs(profile_of(model), None, gated, token_weight)
    indices = [1, 3]  # one may be left out
    for index in indices:
        sums = found.of(index)
        wanted = by_hand(model, index, gated, token_weight)
        for value, expected in zip((sums.count, sums.inputs, sums.hidden), wanted, strict=True):
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.float(), expected, rtol=1e-4, atol=1e-4)


def test_values_that_are_not_finite_are_refused() -> None:
    model = tiny_model("mixtral")
    layer = moe_layers(model)[0]
    layer.experts.gate_up_proj.data[:, 0] = torch.inf
    with pytest.raises(NotFinite, match="layer 0"):
        ExpertInputs(profile_of(model), None).of(0)
