"""What all choices share: the gate of the shared expert."""

from __future__ import annotations

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model

from moe_lab.dependencies import modules_of
from moe_lab.methods.condense.base import choice_named, draws, shared_gate
from moe_lab.methods.condense.gates import mean_selected
from moe_lab.methods.condense.method import Condense
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.profile.collect import collect_statistics
from moe_lab.types import UserError

SEEDED = 3


def choose(*asked: object) -> None:
    """A choice of one's own: a function anywhere."""


def test_choices_are_files_here_or_functions_anywhere() -> None:
    assert choice_named("gates", "mean_selected") is mean_selected.choose
    for path in (__name__, f"{__name__}.choose"):
        for kind in ("gates", "layers", "experts"):
            assert choice_named(kind, path) is choose
    with pytest.raises(UserError, match=r"condense\.gates='.*SEEDED' is no function"):
        choice_named("gates", f"{__name__}.SEEDED")
    with pytest.raises(UserError, match=r"condense\.layers='best' .*or an explicit list"):
        choice_named("layers", "best")
    assert [draws(one) for one in ("random", "research.mine.choose", "greedy_js", [1, 2])] == [
        True, True, False, False,
    ]  # fmt: skip


def test_searches_depend_on_no_way_to_choose_layers() -> None:
    place = "moe_lab.methods.condense"
    method = Condense(1, 2, experts="l1", layers="cosine", gates="mean_all")
    searched, planned = modules_of(*method.searches()), modules_of(method, *method.parts())
    assert {f"{place}.experts.l1", f"{place}.gates.mean_all"} <= searched
    assert not [one for one in searched if one.startswith(f"{place}.layers.")]
    assert planned == searched | {f"{place}.layers.cosine"}
    assert Condense(1, 2, experts=[1], layers=[2], gates="mean_all").parts() == [
        choice_named("gates", "mean_all")
    ]


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
