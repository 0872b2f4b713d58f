"""What all choices share: the gate of the shared expert."""

from __future__ import annotations

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model

from moe_lab.methods.condense.base import shared_gate
from moe_lab.methods.condense.gates import mean_selected
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.profile.collect import collect_statistics


def test_condensing_all_experts_with_the_true_gates_is_the_layer() -> None:
    """Where every token goes to all experts with the same weights, condensing changes nothing."""
    model, batch = tiny_model("qwen2_moe", num_experts_per_tok=8), tiny_batch()
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.zero_()
            layer.shared_gate.weight.zero_()
    before = logits_of(model, batch)
    edits = []
    for found in collect_statistics(model, [batch]):
        gates = mean_selected.choose(found)
        assert gates.tolist() == pytest.approx([1 / 8] * 8)
        assert shared_gate(found) == 0.5
        edits.append(CondenseLayer(found.info.index, found.info.name, experts=tuple(range(8)),
                          gates=tuple(gates.tolist()), shared_gate=0.5))  # fmt: skip
    apply_plan(model, Plan(tuple(edits)))
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)
