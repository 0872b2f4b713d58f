"""DERN's segments against a slow reference in plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny_model
from torch import Tensor

from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import moe_layers
from moe_lab.models.segments import recombine

KEPT, WEIGHTS = (5, 1, 6), (0.5, 2.0, 0.1, 1.0, 0.7, 0.9, 1.5, 0.3)
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss"]  # of which the last lies interleaved, with biases


def layer_of(family: str = "mixtral") -> Any:
    return moe_layers(tiny_model(family, seed=3))[1]


def unit(layer: Any, expert: int, number: int) -> dict[str, Tensor]:
    """One segment: gate row, up row, down column, and the biases of the first two."""
    experts = layer.experts
    if layer.info.family == "gpt_oss":
        gate, up = experts.gate_up_proj[expert].T[2 * number : 2 * number + 2]
        bias = experts.gate_up_proj_bias[expert][2 * number : 2 * number + 2]
        down = experts.down_proj[expert][number]
    else:
        width = layer.info.expert_width
        gate, up = (experts.gate_up_proj[expert][number + i * width] for i in (0, 1))
        bias, down = gate[:0], experts.down_proj[expert][:, number]
    parts = {"gate": gate, "up": up, "bias": bias, "down": down}
    return {name: part.detach().double().clone() for name, part in parts.items()}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def up_and_down(segment: dict[str, Tensor]) -> Tensor:
    return torch.cat([segment["up"], segment["down"]])


def whole(segment: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(segment.values()))


def slow(layer: Any, threshold: float) -> dict[int, list[dict[str, Tensor]]]:
    """The segments of each expert that stays, by the paper's steps one after another."""
    width = layer.info.expert_width
    segments = {e: [unit(layer, e, i) for i in range(width)] for e in range(8)}
    pools = {e: [(one, WEIGHTS[e]) for one in segments[e]] for e in KEPT}
    for expert in sorted(set(range(8)) - set(KEPT)):
        for one in segments[expert]:
            best = {
                e: max(cosine(up_and_down(one), up_and_down(own)) for own in segments[e])
                for e in KEPT
            }
            target = max(KEPT, key=best.__getitem__)
            if best[target] > threshold:
                pools[target].append((one, WEIGHTS[expert]))
    return {e: k_means(pool, width) for e, pool in pools.items()}


def k_means(pool: list[tuple[dict[str, Tensor], float]], number: int) -> list[dict[str, Tensor]]:
    order = sorted(range(len(pool)), key=lambda i: -float(pool[i][0]["gate"].norm()))
    seeds = sorted(order[:number])
    centres, before = [whole(pool[i][0]) for i in seeds], None
    while True:
        nearest = [
            max(range(number), key=lambda c, one=one: cosine(whole(one), centres[c]))
            for one, _ in pool
        ]
        if nearest == before:
            break
        before = nearest
        for c in range(number):
            mine = [pair for pair, at in zip(pool, nearest, strict=True) if at == c]
            if mine:
                centres[c] = sum(w * whole(one) / whole(one).norm() for one, w in mine)
    made = []
    for c in range(number):
        mine = [pair for pair, at in zip(pool, nearest, strict=True) if at == c]
        total = sum(w for _, w in mine)
        made.append(
            {name: sum(w * one[name] for one, w in mine) / total for name in pool[0][0]}
            if mine
            else pool[seeds[c]][0]
        )
    return made


@pytest.mark.parametrize("threshold", [-1.0, 0.25])
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_join_and_are_clustered_as_in_the_paper(family: str, threshold: float) -> None:
    layer = layer_of(family)
    before = copy.deepcopy(layer)
    expected = slow(layer, threshold)
    joined = recombine(layer.experts, KEPT, WEIGHTS, threshold)
    assert sum(joined) == 5 * 16 if threshold == -1 else 0 < sum(joined) < 5 * 16
    for expert in range(8):
        for number in range(layer.info.expert_width):
            found = unit(layer, expert, number)
            same = unit(before, expert, number)
            for name, value in (expected[expert][number] if expert in KEPT else same).items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    changed = [e for e in KEPT if not same_weights(before, layer, e)]
    assert changed == [e for e, number in zip(KEPT, joined, strict=True) if number]


def same_weights(one: Any, other: Any, expert: int) -> bool:
    pairs = zip(
        HiddenUnits(one.experts).parts(expert).values(),
        HiddenUnits(other.experts).parts(expert).values(),
        strict=True,
    )
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_above_all_cosines_nothing_joins_and_nothing_changes(family: str) -> None:
    layer = layer_of(family)
    before = copy.deepcopy(layer)
    assert recombine(layer.experts, KEPT, WEIGHTS, 1.01) == [0, 0, 0]
    assert all(same_weights(before, layer, expert) for expert in range(8))


def test_where_all_stay_nothing_changes() -> None:
    layer = layer_of()
    before = copy.deepcopy(layer)
    assert recombine(layer.experts, range(8), WEIGHTS, -1.0) == [0] * 8
    assert all(same_weights(before, layer, expert) for expert in range(8))


def test_a_copy_joins_its_original_and_changes_nothing() -> None:
    layer = layer_of()
    with torch.no_grad():
        for tensor in HiddenUnits(layer.experts).tensors.values():
            tensor[0] = tensor[1]
    before = copy.deepcopy(layer)
    joined = recombine(layer.experts, (1, 2, 3, 4, 5, 6, 7), WEIGHTS, 0.99)
    assert joined == [16, 0, 0, 0, 0, 0, 0]
    parts, expected = (HiddenUnits(one.experts).parts(1) for one in (layer, before))
    # The seeds are the eight largest twice over, and a copy's cluster has both: the other half is
    # a mixture, so that whoever wants copies to be free needs as many seeds as there are segments.
    same = [
        torch.allclose(parts["gate_up_proj"][i], one, atol=1e-6)
        for i in range(16)
        for one in expected["gate_up_proj"]
    ]
    assert sum(same) >= 8


def test_segments_without_any_weight_leave_the_first() -> None:
    layer = layer_of()
    joined = recombine(layer.experts, KEPT, (0.0,) * 8, -1.0)
    assert sum(joined) == 80
    parts = [HiddenUnits(layer.experts).parts(expert) for expert in KEPT]
    for name in ("gate_up_proj", "down_proj"):
        assert all(bool(one[name].isfinite().all() and one[name].any()) for one in parts)
