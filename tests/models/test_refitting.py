"""What hidden units add by column, and which layers are sums of that."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch, tiny_model
from odd_families import ADAPTED, odd_model
from refits import layer_of

from moe_lab.models.editing import replace_experts, share_experts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.refitting import (
    check_sum,
    handing,
    refit_name,
    routed_hidden,
    shared_down,
    shared_hidden,
    shared_refit_name,
)
from moe_lab.types import UserError


def added(layer: MoELayer, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What all hidden units of a layer add [T, D], by their columns; what its block gives."""
    outputs: list = []
    handle = layer.block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with handing(layer) as catching, torch.no_grad():
        model(**tiny_batch())
    handle.remove()
    handed = catching.taken()
    columns_EID = HiddenUnits(layer.experts).down_columns()
    total_TD = torch.zeros_like(handed.x_TD)
    for expert, columns_ID in enumerate(columns_EID):
        token_S, z_SI = routed_hidden(layer, expert, handed)
        total_TD[token_S] += z_SI @ columns_ID
    down = shared_down(layer)
    if down is not None:
        total_TD += shared_hidden(layer, handed) @ down.weight.T
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return total_TD, output.reshape(total_TD.shape)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "mixtral", "llama4_text", "dbrx"])
def test_columns_times_what_units_compute_are_what_the_block_gives(family: str) -> None:
    model = odd_model(family) if family in ADAPTED else tiny_model(family)
    layer = layer_of(model, 2)
    with torch.no_grad():
        total_TD, output_TD = added(layer, model)
    torch.testing.assert_close(total_TD, output_TD, rtol=1e-4, atol=1e-5)


def test_rows_that_share_an_expert_are_added_and_stand_ins_left_out() -> None:
    shared, replaced = tiny_model("mixtral"), tiny_model("mixtral")
    groups = ((0, 3, 5), (1, 2), (4, 6, 7))
    share_experts(moe_layers(shared)[1], (0, 1, 4), groups)
    replace_experts(moe_layers(replaced)[1], (0, 1, 4), "zero")
    for model in (shared, replaced):
        layer = layer_of(model, 1)
        with torch.no_grad():
            total_TD, output_TD = added(layer, model)
        torch.testing.assert_close(total_TD, output_TD, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_has_none() -> None:
    model = tiny_model("mixtral")
    layer = layer_of(model, 1)
    with handing(layer) as catching, torch.no_grad():
        model(**tiny_batch())
    handed = catching.taken()
    handed = handed._replace(place_TK=torch.zeros_like(handed.place_TK))
    token_S, z_SI = routed_hidden(layer, 5, handed)
    assert len(token_S) == 0 and z_SI.shape == (0, 16)
    every_S, _ = routed_hidden(layer, 0, handed)
    assert every_S.tolist() == list(range(len(handed.x_TD)))


def test_shared_experts_of_another_kind_have_no_columns() -> None:
    layer = layer_of(tiny_model("qwen2_moe"), 1)
    assert shared_down(layer) is layer.shared.down_proj
    layer.shared.further = torch.nn.Linear(3, 3)
    assert shared_down(layer) is None
    assert shared_down(layer_of(tiny_model("mixtral"), 1)) is None


def test_experts_that_end_in_a_norm_are_refused() -> None:
    layer = layer_of(tiny_model("mixtral"), 1)
    check_sum(layer)
    layer.experts.has_post_expert_norm = True
    with pytest.raises(UserError, match=r"layer 1 of mixtral.*ends in a norm.*refit=false"):
        check_sum(layer)


def test_the_tensors_of_a_plan_have_names_of_their_own() -> None:
    names = {refit_name(3), refit_name(4), shared_refit_name(3)}
    assert names == {"layers.3.refit.down_proj", "layers.4.refit.down_proj",
                     "layers.3.refit.shared_down_proj"}  # fmt: skip
