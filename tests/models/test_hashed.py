"""Routers by token id: behind pruning each token has experts that are there, once each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lab.families.tiny import tiny_model
from moe_lab.models.editing import prune_layer
from moe_lab.models.hashed import is_hashed, num_token_ids, remap_tokens
from moe_lab.models.layers import moe_layers
from moe_lab.models.probing import route
from moe_lab.models.routers import restricted_layer
from moe_lab.types import UserError

KEPT = [0, 2, 3, 5, 6, 7]


def layer_with(table_VK: list[list[int]], rows_ED: list[list[float]]) -> Any:
    router = nn.Module()
    router.weight = nn.Parameter(torch.tensor(rows_ED))
    router.register_buffer("tid2eid", torch.tensor(table_VK))
    return SimpleNamespace(router=router)


# Expert 1 points where 2 does, then where 3 does; 0 is the opposite.
ROWS = [[-1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, 1.0]]


def test_a_lost_expert_is_replaced_by_the_most_similar_that_its_token_has_not() -> None:
    layer = layer_with([[1, 0], [1, 2], [2, 3], [0, 1]], ROWS)
    remap_tokens(layer, [0, 2, 3], into={})
    kept = {0: 0, 2: 1, 3: 2}
    expected = [[2, 0], [3, 2], [2, 3], [0, 2]]
    assert layer.router.tid2eid.tolist() == [[kept[e] for e in row] for row in expected]


def test_an_expert_that_went_into_another_is_replaced_by_that_one() -> None:
    layer = layer_with([[1, 2], [1, 0]], ROWS)
    remap_tokens(layer, [3, 0, 2], into={1: 3})
    assert layer.router.tid2eid.tolist() == [[0, 2], [0, 1]]


def test_a_pruned_layer_gives_tokens_their_own_experts_where_they_stay() -> None:
    model = tiny_model("deepseek_v4")
    layer, other = moe_layers(model)[:2]
    assert is_hashed(layer) and not is_hashed(other)
    ids = torch.arange(num_token_ids(layer))
    x_TD = torch.randn(len(ids), layer.info.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = route(layer, x_TD, ids)
        prune_layer(layer, KEPT)
        after = route(moe_layers(model)[0], x_TD, ids)
    chosen: Tensor = torch.tensor(KEPT)[after[2]]
    stays = torch.isin(before[2], torch.tensor(KEPT)).all(dim=1)
    assert 0 < stays.sum() < len(ids)
    assert torch.equal(chosen[stays], before[2][stays])
    torch.testing.assert_close(after[1][stays], before[1][stays])
    assert all(len(set(row)) == len(row) for row in chosen.tolist())


def test_experts_chosen_by_token_id_cannot_be_left_out_for_a_while() -> None:
    layer = moe_layers(tiny_model("deepseek_v4"))[0]
    with pytest.raises(UserError, match="by its id"), restricted_layer(layer, KEPT):
        pass
