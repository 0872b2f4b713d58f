"""Condensed layers: one dense MLP, or the family's own block with one wide expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, logits_of, tiny_batch, tiny_model
from odd_blocks import BLOCKS, odd_model, with_constant_gates

from moe_lab.models.condensing import (
    check_condensable,
    condensed,
    dense_terms,
    edited_blocks,
    is_condensed_in_place,
    one_wide_expert,
    part_widths,
    width_of,
)
from moe_lab.models.editing import DenseMLP, set_block
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.types import UserError

EXPERTS, GATES = [5, 0, 6], [0.2, 0.5, 0.1]
ONE_MLP = [name for name in FAMILIES if name != "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_condensed_equals_the_sum_of_its_parts(family: str) -> None:
    layer = moe_layers(tiny_model(family))[0]
    x_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    shared_gate = 0.4 if layer.shared_gate is not None else 1.0
    with torch.no_grad():
        parameters = expert_parameters(layer.experts)
        parts = zip(EXPERTS, GATES, strict=True)
        expected = sum(g * expert_forward(layer.experts, parameters[e], x_TD) for e, g in parts)
        if layer.shared is not None:
            expected = expected + shared_gate * layer.shared(x_TD)
        dense = condensed(layer, EXPERTS, GATES, shared_gate=shared_gate)
        found = hidden_of(dense(x_TD[None]))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(dense, DenseMLP) == (family in ONE_MLP)
    inside = width_of(dense) + (layer.info.shared_width if family not in ONE_MLP else 0)
    assert inside == sum(part_widths(layer.info, EXPERTS))


@pytest.mark.parametrize("kind", [*BLOCKS, "a norm behind"])
def test_a_made_up_family_is_condensed_to_what_constant_gates_make_of_it(kind: str) -> None:
    model, reference, batch = odd_model(kind), odd_model(kind), tiny_batch()
    with_constant_gates(reference, 2, EXPERTS, GATES, shared=0.3)
    expected = logits_of(reference, batch)
    layer = next(layer for layer in moe_layers(model) if layer.info.index == 2)
    set_block(model, layer.info.name, condensed(layer, EXPERTS, GATES, 0.3))
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert (logits_of(odd_model(kind), batch) - expected).abs().max() > 1e-2
    one_mlp = kind in ("a factor", "an average", "a norm behind")
    assert (dense_terms(moe_layers(odd_model(kind))[1]) is not None) == one_mlp
    assert is_condensed_in_place(model.get_submodule(layer.info.name)) != one_mlp
    assert list(edited_blocks(model)) == [layer.info.name]
    assert [layer.info.index for layer in moe_layers(model)] == [1, 3]


def test_experts_that_do_more_than_their_weighted_sum_are_refused() -> None:
    layer = moe_layers(tiny_model("qwen2_moe"))[0]
    check_condensable(layer)
    kind = type(layer.experts)

    class Louder(kind):
        def forward(self, *arguments):
            return super().forward(*arguments) * 1.5

    layer.experts.__class__ = Louder
    with pytest.raises(UserError, match="does more than add its experts"):
        condensed(layer, EXPERTS, GATES, 1.0)


def test_a_block_that_is_kept_needs_an_expert() -> None:
    layer = moe_layers(odd_model("a norm"))[0]
    with pytest.raises(UserError, match="which needs an expert"):
        condensed(layer, [], [], 0.5)


def test_the_structure_is_built_again_without_weights(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    layer = moe_layers(model)[1]
    kept = condensed(layer, EXPERTS, GATES, 1.0)
    built = moe_layers(tiny_model("gpt_oss").to("meta"))[1]
    again = one_wide_expert(built, width_of(kept))
    shapes = [
        {key: tensor.shape for key, tensor in one.state_dict().items()} for one in (kept, again)
    ]
    assert shapes[0] == shapes[1] and width_of(again) == 48
