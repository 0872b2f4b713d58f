"""Condensed layers: one dense MLP, or the family's own block with one wide expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, logits_of, tiny_batch, tiny_model
from odd_blocks import BLOCKS, REFUSED, odd_model, with_constant_gates
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_lab.families import references
from moe_lab.families import tiny as families
from moe_lab.models.checkpoint import load
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
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.saving import save_checkpoint
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
            return super().forward(*arguments) * 1.01

    layer.experts.__class__ = Louder
    with pytest.raises(UserError, match="does more than add its experts"):
        condensed(layer, EXPERTS, GATES, 1.0)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_block_whose_weights_do_more_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="cannot be condensed"):
        condensed(moe_layers(odd_model(kind))[0], EXPERTS, GATES, 0.3)


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


# Whose condensed or dropped layers were once wrong without a word: a factor behind the experts, a
# norm behind both, a norm that dense layers lack, an average and attention that rotates where the
# layer is dense; biases of the shared experts, which a checkpoint may have.
ONCE_SILENT = {
    "laguna": {},
    "axk1": {},
    "axk2": {},
    "cohere2_moe": {},
    "hy_v3": {"mlp_bias": True},
    "deepseek_v2": {"mlp_bias": True},
    "ernie4_5_moe": {"use_bias": True},
}


def once_silent(family: str) -> PreTrainedModel:
    config = families.tiny_config(family)
    for name, value in ONCE_SILENT[family].items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, one in model.named_parameters():
            one.copy_(torch.randn(one.shape) * 0.2 + ("norm" in name and one.dim() == 1))
    return model


@pytest.mark.parametrize("kind", ["condense", "drop_layer"])
@pytest.mark.parametrize("family", ONCE_SILENT)
def test_what_was_once_wrong_without_a_word_is_the_reference_read_back(
    family: str, kind: str, tmp_path: Path
) -> None:
    model, batches = once_silent(family), [tiny_batch()]
    model.save_pretrained(tmp_path / "dense")
    info = moe_layers(model)[-1].info
    edit: Edit = DropLayer(info.index, info.name)
    reference = references.dropped
    if kind == "condense":
        edit = CondenseLayer(info.index, info.name, experts=(5, 2), gates=(0.7, 0.4))
        reference = references.with_constant_weights
    expected = reference(once_silent(family), edit.to_json(), batches)[0]
    apply_plan(model, Plan((edit,)))
    save_checkpoint(model, tmp_path / "out", tmp_path / "dense", padding=1.0)
    found = references.logits_of(load(tmp_path / "out"), batches)[0]
    dense = references.logits_of(once_silent(family), batches)[0]
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale < (dense - expected).abs().max()


def test_a_layer_that_was_pruned_before_it_is_condensed_is_read_back(tmp_path: Path) -> None:
    """Zaya's router stays, for what it hands on, with as many rows as it then has."""
    model = families.tiny_model("zaya")
    model.save_pretrained(tmp_path / "dense")
    info = moe_layers(model)[-1].info
    kept = PruneExperts(info.index, info.name, kept=(0, 2, 3, 5, 6, 7))
    edit = CondenseLayer(info.index, info.name, experts=(5, 2), gates=(0.7, 0.4))
    apply_plan(model, Plan((kept, edit)))
    want = logits_of(model, tiny_batch())
    save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
    assert torch.equal(logits_of(load(tmp_path / "out"), tiny_batch()), want)
