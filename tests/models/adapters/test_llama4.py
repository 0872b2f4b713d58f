"""Llama 4: the router's weights are inside what its experts give."""

from __future__ import annotations

import torch
from families import logits_of, tiny_batch
from odd_families import odd_model

from moe_lab.models.condensing import condensed
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import moe_layers
from moe_lab.models.observing import observe
from moe_lab.types import Routing


def test_pairs_have_the_outputs_of_weighted_inputs_and_weight_1() -> None:
    model, seen = odd_model("llama4_text", num_experts_per_tok=2), dict[int, Routing]()
    plain = logits_of(model)
    layer = moe_layers(model)[0]
    with torch.no_grad(), observe(model, lambda info, one: seen.update({info.index: one})) as now:
        now.valid = tiny_batch()["attention_mask"].bool()
        logits = model(**tiny_batch()).logits
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        one = seen[0]
        weight_TK, index_TK = one.logits_TE.topk(2, dim=1)
        assert torch.equal(one.index_TK, index_TK)
        assert torch.equal(one.weight_TK, weight_TK.sigmoid())
        assert torch.equal(one.weight_S, torch.ones_like(one.weight_S))
        parameters, total = expert_parameters(layer.experts), torch.zeros_like(one.x_TD)
        for y, expert, token in zip(
            one.y_SD, one.expert_S.tolist(), one.token_S.tolist(), strict=True
        ):
            weight = one.logits_TE[token, expert].sigmoid()
            x_TD = weight * one.x_TD[token : token + 1]
            expected = expert_forward(layer.experts, parameters[expert], x_TD)[0]
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            total[token] += y
        torch.testing.assert_close(one.routed_TD, total, rtol=1e-4, atol=1e-5)


def test_condensed_its_gates_multiply_what_its_experts_get() -> None:
    model, reference = odd_model("llama4_text"), odd_model("llama4_text")
    chosen, gates = [5, 2], [0.6, 0.3]

    def force(module, args, output):
        tokens = len(output[2])
        weight = torch.tensor(gates).expand(tokens, -1)
        return output[0], weight, torch.tensor(chosen).expand(tokens, -1)

    moe_layers(reference)[0].router.register_forward_hook(force)
    layer = moe_layers(model)[0]
    assert condensed(layer, chosen, gates, 1.0) is layer.block
    with torch.no_grad():
        found, expected = (one(**tiny_batch()).logits for one in (model, reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
