"""Layers as ratios see them where hidden units go."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from families import tiny_model

from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.coverage import Coverage
from moe_lab.methods.ratios.listed import Listed
from moe_lab.methods.ratios.neurons import (
    Neurons,
    foreseen_neurons,
    ranked_by_expert,
    ranked_by_layer,
)
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.layers import moe_layers
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

INFO = LayerInfo(
    2, "model.layers.2.mlp", num_experts=3, top_k=2, hidden_size=4, expert_width=5,
    neuron_parameters=12, neuron_bytes=24, expert_parameters=64, expert_bytes=128,
    model_parameters=1000, model_bytes=2000, shared=True, shared_width=10,
    shared_neuron_parameters=12, shared_neuron_bytes=24,
)  # fmt: skip
SCORE = torch.tensor(
    [[5.0, 1.0, 3.0, 2.0, 4.0], [50.0, 10.0, 30.0, 20.0, 40.0], [0.3, 0.5, 0.1, 0.4, 0.2]]
)
NOTHING = Profile([])


def kept_by(pool: Neurons, number: int) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in pool.kept(number)]


def test_by_layer_every_expert_loses_its_own_worst() -> None:
    pool, score_I = ranked_by_layer(INFO, SCORE)
    assert (pool.num_experts, pool.groups, pool.top_k) == (5, 1, 1)
    assert kept_by(pool, 2) == [[0, 4], [0, 4], [1, 3]]
    assert kept_by(pool, 5) == [[0, 1, 2, 3, 4]] * 3
    assert kept_by(pool, 0) == [[]] * 3
    expected = [sum(sorted(row, reverse=True)[r] for row in SCORE.tolist()) / 3 for r in range(5)]
    assert score_I.tolist() == pytest.approx(expected)
    assert (pool.expert_parameters, pool.expert_bytes) == (3 * 12, 3 * 24)


def test_by_expert_all_units_of_a_layer_are_ranked_together() -> None:
    pool, score_N = ranked_by_expert(INFO, SCORE)
    assert pool.num_experts == 15
    assert score_N.tolist() == sorted(SCORE.flatten().tolist(), reverse=True)
    for number in range(16):
        threshold = sorted(SCORE.flatten().tolist(), reverse=True)[:number]
        assert torch.equal(pool.kept(number), torch.isin(SCORE, torch.tensor(threshold)))


def test_a_floor_comes_first_and_blocks_stay_together() -> None:
    pool, _ = ranked_by_expert(INFO, SCORE, floor=1)
    assert kept_by(pool, 3) == [[0], [0], [1]]
    assert kept_by(pool, 5) == [[0], [0, 2, 4], [1]]
    pool, score_N = ranked_by_expert(INFO, SCORE, block=2)
    assert kept_by(pool, 2) == [[], [0, 4], []]
    assert kept_by(pool, 4) == [[], [0, 2, 3, 4], []]
    assert kept_by(pool, 15) == [[0, 1, 2, 3, 4]] * 3
    assert len(score_N) == 15


def test_ties_put_the_lower_expert_and_unit_first() -> None:
    pool, _ = ranked_by_expert(INFO, torch.zeros(3, 5))
    assert kept_by(pool, 7) == [[0, 1, 2, 3, 4], [0, 1], []]
    pool, _ = ranked_by_layer(INFO, torch.zeros(3, 5))
    assert kept_by(pool, 2) == [[0, 1]] * 3


def test_permuting_neurons_permutes_what_stays() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    for ranked, number in itertools.product((ranked_by_layer, ranked_by_expert), range(6)):
        plain, _ = ranked(INFO, SCORE)
        moved, _ = ranked(INFO, SCORE[:, order])
        assert torch.equal(moved.kept(number), plain.kept(number)[:, order])


def test_shared_units_go_with_the_others() -> None:
    shared = torch.arange(10.0)
    pool, _ = ranked_by_layer(INFO, SCORE, shared)
    for number in range(6):
        kept = pool.shared_kept(number)
        assert kept is not None
        assert kept.nonzero().flatten().tolist() == list(range(10 - 2 * number, 10))
    assert pool.expert_bytes == 3 * 24 + 2 * 24
    pool, _ = ranked_by_expert(INFO, SCORE, shared)
    assert pool.num_experts == 25
    kept = pool.shared_kept(8)
    assert kept is not None
    together = int(pool.kept(8).sum()) + int(kept.sum())
    assert together == 8
    assert kept.nonzero().flatten().tolist() == [7, 8, 9]


def test_what_is_foreseen_has_the_numbers_of_what_is_ranked() -> None:
    for widths, ranked in (("by_layer", ranked_by_layer), ("by_expert", ranked_by_expert)):
        for shared in (None, torch.arange(10.0)):
            pool, _ = ranked(INFO, SCORE, shared)
            seen = foreseen_neurons(INFO, widths, shared is not None)
            assert (seen.num_experts, seen.expert_bytes) == (pool.num_experts, pool.expert_bytes)
            assert seen.items == pool.items


def layers_of(score: torch.Tensor, count: int = 3) -> list[tuple[LayerInfo, torch.Tensor]]:
    return [(replace(INFO, index=i), score * (1 + i)) for i in range(count)]


@pytest.mark.parametrize("ranked", [ranked_by_layer, ranked_by_expert])
def test_ratios_work_on_neurons_as_on_experts(ranked) -> None:
    pools = [ranked(info, score) for info, score in layers_of(SCORE)]
    infos = [pool for pool, _ in pools]
    total = sum(info.num_experts for info in infos)
    uniform = Uniform(0.4)
    uniform.check(infos)
    assert uniform.numbers(pools, NOTHING) == dict.fromkeys(range(3), infos[0].num_experts * 3 // 5)
    everywhere = Global(0.4)
    everywhere.check(infos)
    numbers = everywhere.numbers(pools, NOTHING)
    assert sum(numbers.values()) == total * 3 // 5
    worst = min(float(s[numbers[p.index] - 1]) for p, s in pools if numbers[p.index])
    best_gone = max(
        (float(s[numbers[p.index]]) for p, s in pools if numbers[p.index] < len(s)), default=0.0
    )
    assert worst >= best_gone
    told = everywhere.told(infos, numbers)["given"]
    assert told["ratio"] == pytest.approx(0.4)
    assert told["hidden_units"] == "18 of 45 hidden units"
    covered = Coverage(0.8).numbers(pools, NOTHING)
    for pool, score in pools:
        share = [float(score[:n].sum() / score.sum()) for n in range(len(score) + 1)]
        number = covered[pool.index]
        assert share[number] >= 0.8 - 1e-12 > share[number - 1]
    assert Listed({1: 2}).numbers(pools, NOTHING)[1] == 2


def test_heaprs_ranking_is_one_of_all_units_of_all_layers() -> None:
    """ratio=global by_expert keeps exactly the highest scores of the model."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    pools = [ranked_by_expert(replace(INFO, index=i), s) for i, s in enumerate(scores)]
    numbers = Global(0.37).numbers(pools, NOTHING)
    number = round(45 * (1 - 0.37))
    threshold = torch.stack(scores).flatten().sort(descending=True).values[number - 1]
    for (pool, _), score in zip(pools, scores, strict=True):
        assert torch.equal(pool.kept(numbers[pool.index]), score >= threshold)


def test_multiples_floors_and_sizes() -> None:
    wide = replace(INFO, expert_width=40)
    score = torch.rand(3, 40, generator=torch.Generator().manual_seed(1))
    pools = [ranked_by_layer(replace(wide, index=i), score) for i in range(2)]
    assert Uniform(0.3, round_to=16).numbers(pools, NOTHING) == {0: 32, 1: 32}
    with pytest.raises(UserError, match=r"ratio.floor=64: the experts of layer 0 have only 40"):
        Global(0.3, floor=64).check([pool for pool, _ in pools])
    with pytest.raises(UserError, match="all 240 hidden units"):
        Uniform(0.01, round_to=8).check([pool for pool, _ in pools])
    of_model = Global(0.1, of="bytes")
    removed = 80 - sum(of_model.numbers(pools, NOTHING).values())
    assert removed * 72 == pytest.approx(0.1 * 2000, abs=72)
    target = Global(0.5, target_gib=1000 / 2**30)
    gone = 80 - sum(target.numbers(pools, NOTHING).values())
    assert 2000 - gone * 72 <= 1000 < 2000 - (gone - 1) * 72


def test_sizes_of_neurons_are_those_of_tensors() -> None:
    for family in ("qwen2_moe", "gpt_oss", "deepseek_v3"):
        for layer in moe_layers(tiny_model(family)):
            info, experts = layer.info, layer.experts
            whole = sum(
                getattr(experts, name).numel()
                for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj")
                if hasattr(experts, name)
            )
            assert info.neuron_parameters * 16 * 8 == whole
            assert info.neuron_bytes == 4 * info.neuron_parameters
            if layer.shared is not None:
                size = sum(p.numel() for p in layer.shared.parameters())
                assert info.shared_neuron_parameters * info.shared_width == size
