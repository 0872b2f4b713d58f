"""Narrower experts: what they compute, and by which code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_model
from narrowing import UNEVEN, by_hand, narrow, narrow_plan

from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.narrowing import (
    fit_implementation,
    fits_grouped,
    left_with,
    narrow_experts,
    narrow_shared,
    neurons_name,
    places_of_kept,
    widen_shared,
)
from moe_lab.models.widths import widths_of


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("widths", [(8,) * 8, (7,) * 8, UNEVEN], ids=["even", "odd", "uneven"])
def test_a_narrowed_layer_is_the_sum_over_what_stays(
    family: str, widths: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    plan = narrow(model, widths)
    layer = moe_layers(model)[1]
    x_TD = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, weight_TK, index_TK, *_ = layer.router(x_TD)
        found = layer.experts(x_TD, index_TK, weight_TK)
    kept_EI = plan.tensors[neurons_name(layer.info.index)].bool()
    chosen = weight_TK.float(), index_TK
    expected = by_hand(tmp_path, family, layer.info.index, kept_EI, x_TD, chosen)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert widths_of(layer.experts) == widths


def test_silenced_units_are_those_that_go() -> None:
    model, other = tiny_model("gpt_oss"), tiny_model("gpt_oss")
    plan = narrow_plan(model, UNEVEN)
    kept = {edit.index: plan.tensors[neurons_name(edit.index)].bool() for edit in plan.edits}
    before = logits_of(model)
    with left_with(model, kept):
        silenced = logits_of(model)
    assert torch.equal(logits_of(model), before)
    apply_plan(other, plan)
    torch.testing.assert_close(logits_of(other), silenced, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(silenced, before, atol=1e-3)


def test_narrowed_again_zeros_behind_are_no_units() -> None:
    model = tiny_model("mixtral")
    narrow(model, UNEVEN)
    layer = moe_layers(model)[0]
    whole = torch.ones(8, 12, dtype=torch.bool)
    expected = logits_of(model)
    narrow_experts(layer, places_of_kept(whole))
    assert widths_of(layer.experts) == UNEVEN
    assert torch.equal(logits_of(model), expected)
    narrow_experts(layer, torch.arange(4, 12).expand(8, 8))
    assert widths_of(layer.experts) == (0, 1, 5, 8, 0, 8, 3, 0)
    assert moe_layers(model)[0].info.expert_width == 8


def test_shared_experts_get_narrower_and_are_filled_up() -> None:
    model = tiny_model("qwen2_moe")
    layer = moe_layers(model)[0]
    with torch.no_grad():
        layer.shared.get_parameter("down_proj.weight")[:, 20:] = 0.0
    expected = logits_of(model)
    narrow_shared(layer, range(20))
    assert moe_layers(model)[0].info.shared_width == 20
    assert layer.shared.gate_proj.out_features == layer.shared.down_proj.in_features == 20
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    widen_shared(moe_layers(model)[0], 32)
    assert moe_layers(model)[0].info.shared_width == 32
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_eager_code_computes_what_grouped_products_cannot() -> None:
    model = tiny_model("mixtral")
    assert fits_grouped(model) and not fit_implementation(model)
    narrow(model, (12,) * 8)  # 48 bytes a row in float32
    assert fits_grouped(model) and model.config._experts_implementation == "grouped_mm"
    model = model.bfloat16()  # 24 bytes
    assert not fits_grouped(model)
    assert fit_implementation(model) and model.config._experts_implementation == "eager"
    assert not fit_implementation(model), "it is so already"
    assert logits_of(model).isfinite().all()


def test_a_way_to_compute_that_somebody_chose_stays() -> None:
    model = tiny_model("mixtral")
    model.set_experts_implementation("batched_mm")
    narrow(model, (7,) * 8)
    assert model.config._experts_implementation == "batched_mm"
    assert logits_of(model).isfinite().all()
