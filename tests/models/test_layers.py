"""MoE layers of real families: found, and their experts run one by one."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, tiny_model
from slow_router import slow_router

from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import check_kept, moe_layers
from moe_lab.types import LayerInfo, UserError


@EACH_FAMILY
def test_finds_the_layers(family: str) -> None:
    infos = [layer.info for layer in moe_layers(tiny_model(family))]
    first = 1 if family in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe") else 0
    assert [info.index for info in infos] == list(range(first, 4))
    assert {info.num_experts for info in infos} == {8}
    assert {info.top_k for info in infos} == {3 if family in ("qwen2_moe", "olmoe") else 2}
    assert {info.hidden_size for info in infos} == {32}
    shared = {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"}
    assert all(info.shared == (family in shared) for info in infos)
    assert {info.num_decoders for info in infos} == {4}
    assert {info.expert_width for info in infos} == {16}
    width = {"qwen2_moe": 24}.get(family, 16 if family in shared else 0)
    assert {info.shared_width for info in infos} == {width}
    assert all((info.groups, info.groups_used) == ((2, 1) if family == "deepseek_v3" else (1, 1))
               for info in infos)  # fmt: skip


@EACH_FAMILY
def test_the_slow_experts_make_the_block(family: str) -> None:
    """The reference above stands on its own: summed up, it is the model's block."""
    model = tiny_model(family)
    layer, config = moe_layers(model)[0], model.config
    x_TD = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = layer.block(x_TD[None])
        out = (out[0] if isinstance(out, tuple) else out)[0]
        for x, y in zip(x_TD, out, strict=True):
            weight, _ = slow_router(layer, x, config)
            total = sum(
                weight[e] * expert_forward(layer.experts, p, x[None])[0]
                for e, p in enumerate(expert_parameters(layer.experts))
            )
            if layer.shared is not None:
                gate = layer.shared_gate(x).sigmoid() if layer.shared_gate is not None else 1.0
                total = total + gate * layer.shared(x)
            torch.testing.assert_close(total.float(), y, rtol=1e-4, atol=1e-5)


def test_too_few_experts_are_refused_with_both_numbers() -> None:
    info = LayerInfo(3, "model.layers.3.mlp", num_experts=8, top_k=3, hidden_size=32)
    check_kept(info, 3)
    with pytest.raises(UserError, match=r"layer 3: 2 of 8 .* chooses 3"):
        check_kept(info, 2)
    grouped = LayerInfo(3, "m", num_experts=8, top_k=3, hidden_size=32, groups=2, groups_used=1)
    check_kept(grouped, 6)
    for impossible in (7, 4):
        with pytest.raises(UserError, match="same number"):
            check_kept(grouped, impossible)
