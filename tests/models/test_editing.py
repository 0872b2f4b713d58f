"""Edits of a loaded model: pruned is masked, condensed is the sum of its parts."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, FAMILIES, logits_of, tiny_batch, tiny_model
from odd_blocks import odd_model
from torch import Tensor
from torch.nn import functional as F

from moe_lab.families import tiny as families
from moe_lab.models.editing import merge_router_rows, prune_layer
from moe_lab.models.layers import moe_layers


@EACH_FAMILY
def test_pruning_nothing_is_the_identity(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    before = logits_of(model, batch)
    for layer in moe_layers(model):
        prune_layer(layer, range(8))
    assert torch.equal(logits_of(model, batch), before)


def test_what_the_block_itself_has_of_each_expert_goes_with_it() -> None:
    kept, batch = [0, 2, 3, 5, 7], tiny_batch()
    model, masked = odd_model("a bias of each expert"), odd_model("a bias of each expert")
    for layer in moe_layers(masked):
        mask_router(layer, [1, 4, 6])
    for layer in moe_layers(model):
        prune_layer(layer, kept)
    expected = logits_of(masked, batch)
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-5)


@EACH_FAMILY
def test_pruning_equals_masking_the_router(family: str) -> None:
    kept = [0, 1, 3, 4, 6, 7] if family == "deepseek_v3" else [0, 2, 3, 5, 7]
    model, masked, batch = tiny_model(family), tiny_model(family), tiny_batch()
    gone = [expert for expert in range(8) if expert not in kept]
    for layer in moe_layers(masked):
        mask_router(layer, gone)
    for layer in moe_layers(model):
        prune_layer(layer, kept)
    torch.testing.assert_close(
        logits_of(model, batch), logits_of(masked, batch), rtol=1e-4, atol=1e-5
    )


def mask_router(layer, gone: list[int]) -> None:
    """Make a router's logits -inf for some experts, without touching its other arithmetic."""
    router = layer.router
    if "e_score_correction_bias" in dict(router.named_buffers()):
        # A sigmoid of -inf is 0; selection adds the bias, so that goes to -inf as well. Group
        # scores then ignore the masked experts as removed ones.
        with torch.no_grad():
            router.e_score_correction_bias[gone] = -1e4
        return
    linear = F.linear

    def masking(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear(x, weight, bias)
        logits[:, gone] = float("-inf")
        return logits

    forward = router.forward

    def patched(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", masking)
            return forward(*args, **kwargs)

    router.forward = patched


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
def test_pruning_all_but_k_is_masking_the_router(family: str) -> None:
    """All other logits -inf before the family's own scoring; by hand, on each layer's block."""
    model = tiny_model(family)
    for layer in moe_layers(model):
        kept = list(range(1, 1 + layer.info.top_k))
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(layer.info.index))
        weight, bias = layer.router.weight.clone(), getattr(layer.router, "bias", None)
        logits = x @ weight.T + (0 if bias is None else bias)
        masked = torch.full_like(logits, -torch.inf)
        masked[:, kept] = logits[:, kept]
        scores = {"glm4_moe": torch.sigmoid}.get(family, lambda z: z.softmax(-1))(masked)
        if family in ("qwen3_moe", "mixtral", "glm4_moe"):
            scores = scores / scores.sum(-1, keepdim=True)
        factor = getattr(layer.block, "routed_scaling_factor", 1.0)
        factor = getattr(layer.router, "routed_scaling_factor", factor)
        prune_layer(layer, kept)
        _, weight_TK, index_TK = layer.router(x)
        expected = factor * scores[:, kept].gather(1, index_TK)
        torch.testing.assert_close(weight_TK, expected, rtol=1e-5, atol=1e-6)
        assert all(sorted(row) == list(range(layer.info.top_k)) for row in index_TK.tolist())


def test_a_factor_of_each_expert_is_not_summed_with_its_row() -> None:
    """gemma4 multiplies each chosen weight by one: the merged expert keeps its own."""
    layer = moe_layers(families.tiny_model("gemma4_text"))[0]
    row_ED = layer.router.get_parameter("proj.weight").detach().clone()
    scale_E = layer.router.get_parameter("per_expert_scale").detach().clone()
    merge_router_rows(layer, [0, 3], [[0, 1], [3, 5, 6]], None)
    assert torch.equal(layer.router.get_parameter("per_expert_scale"), scale_E)
    expected = row_ED[[3, 5, 6]].sum(dim=0)
    torch.testing.assert_close(layer.router.get_parameter("proj.weight")[3], expected)
