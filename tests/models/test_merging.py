"""Merges carried out: matching of hidden units, averages, routers."""

from __future__ import annotations

import pytest
import torch
from edited_models import make_identical
from families import EACH_FAMILY, logits_of, tiny_model
from torch import Tensor, nn

from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import moe_layers
from moe_lab.models.merging import matching

GROUPS = ((0, 3, 5), (1,), (4, 2), (6, 7))  # of 8 experts; deepseek_v3's router has 0-3 and 4-7
KEPT = tuple(group[0] for group in GROUPS)


def merge(index: int, shares: tuple = (0.25, 0.5, 0.25), **options: object) -> dict:
    weights = (shares, (1.0,), (0.75, 0.25), (0.5, 0.5))
    edit = {"index": index, "edit": "merge", "kept": KEPT, "groups": GROUPS, "weights": weights}
    return edit | options


def apply(model: nn.Module, edits: list[dict]) -> nn.Module:
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    named = ({"name": names[edit["index"]]} | edit for edit in edits)
    apply_plan(model, Plan(tuple(map(read_edit, named))))
    return model


def outputs(experts: nn.Module, x_TD: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [expert_forward(experts, one, x_TD) for one in expert_parameters(experts)]


def test_matching_undoes_a_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(9, 5, generator=generator)
    order = torch.randperm(9, generator=generator)
    shuffled = units[order]
    assert torch.equal(shuffled[matching(units, shuffled)], units)


@EACH_FAMILY
def test_merging_identical_experts_gives_that_expert_to_the_bit(family: str) -> None:
    """Also where their hidden units come in another order, but only if they are matched."""
    for align in ("weights", "none"):
        model = tiny_model(family)
        layer = moe_layers(model)[-1]
        make_identical(layer.experts, GROUPS)
        x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        before = outputs(layer.experts, x_TD)
        for members in GROUPS:  # shuffled units make the same function
            for member in members:
                torch.testing.assert_close(before[member], before[members[0]], rtol=1e-4, atol=1e-5)
        apply(model, [merge(layer.info.index, align=align)])
        after = outputs(moe_layers(model)[-1].experts, x_TD)
        same = [torch.equal(after[i], before[expert]) for i, expert in enumerate(KEPT)]
        assert same == ([True] * 4 if align == "weights" else [False, True, False, False])


@EACH_FAMILY
def test_a_merge_of_identical_experts_is_pruning_the_others(family: str) -> None:
    merged, pruned = tiny_model(family), tiny_model(family)
    indices = [layer.info.index for layer in moe_layers(merged)]
    for model in (merged, pruned):
        for layer in moe_layers(model):
            make_identical(layer.experts, GROUPS)
    before = logits_of(merged)
    apply(merged, [merge(index) for index in indices])
    apply(pruned, [{"index": i, "edit": "prune", "kept": KEPT} for i in indices])
    assert torch.equal(logits_of(merged), logits_of(pruned))
    assert not torch.allclose(logits_of(merged), before, atol=1e-3)  # routers lost rows


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_merging_a_layer_of_one_function_is_the_identity(family: str) -> None:
    """Where weights are renormalised it does not matter which of equal experts are chosen."""
    model = tiny_model(family)
    for layer in moe_layers(model):
        make_identical(layer.experts, (tuple(range(8)),))
    before = logits_of(model)
    apply(model, [merge(layer.info.index) for layer in moe_layers(model)])
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-4)


@EACH_FAMILY
def test_averages_and_routers_are_what_was_asked_for(family: str) -> None:
    plain, dominant, mean, added = (tiny_model(family) for _ in range(4))
    index = moe_layers(plain)[-1].info.index
    apply(dominant, [merge(index, align="none")])
    apply(mean, [merge(index, align="none", router="mean")])
    apply(added, [merge(index, align="none", router="sum")])
    one, two, three, four = (moe_layers(model)[-1] for model in (plain, dominant, mean, added))
    weights = merge(index)["weights"]

    def averaged(tensor: Tensor) -> Tensor:
        means = [
            sum(share * tensor[member].double() for member, share in zip(members, row, strict=True))
            for members, row in zip(GROUPS, weights, strict=True)
        ]
        return torch.stack(means).float()

    for name, tensor in one.experts.named_parameters():
        assert torch.equal(two.experts.get_parameter(name), averaged(tensor.detach()))
        assert torch.equal(two.experts.get_parameter(name), three.experts.get_parameter(name))
    for name, tensor in one.router.state_dict().items():
        assert torch.equal(two.router.state_dict()[name], tensor[list(KEPT)])
        torch.testing.assert_close(three.router.state_dict()[name], averaged(tensor))
        rows = torch.stack([tensor[list(members)].sum(dim=0) for members in GROUPS])
        torch.testing.assert_close(four.router.state_dict()[name], rows)
    if one.shared is not None:
        for name, tensor in one.shared.named_parameters():
            assert torch.equal(three.shared.get_parameter(name), tensor)
