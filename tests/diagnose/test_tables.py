"""Tables of a diagnosis: every figure against a loop over tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, islice, permutations

import numpy as np
import pytest
import torch
from families import ROUTER_KINDS, tiny_batch, tiny_model

from moe_lab.diagnose import similarity
from moe_lab.diagnose import tables as diagnose_tables
from moe_lab.models.layers import moe_layers
from moe_lab.models.observing import observe
from moe_lab.profile import collect
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo, Routing


@dataclass
class Seen:
    """One token at one layer: its experts, their weights and the norms of their outputs."""

    experts: list[int]
    weights: list[float]
    norms: list[float]
    logits: torch.Tensor


def observed(model: torch.nn.Module, batches: list[dict]) -> dict[int, list[Seen]]:
    """Every token of every layer, one by one."""
    found: dict[int, list[Seen]] = {}

    def note(info: LayerInfo, routing: Routing) -> None:
        for token, (experts, weights) in enumerate(
            zip(routing.index_TK.tolist(), routing.weight_TK.tolist(), strict=True)
        ):
            norms = []
            for expert in experts:
                here = (routing.expert_S == expert) & (routing.token_S == token)
                norms.append(float(routing.y_SD[here][0].double().norm()))
            seen = Seen(experts, weights, norms, routing.logits_TE[token].double())
            found.setdefault(info.index, []).append(seen)

    with torch.no_grad(), observe(model, note) as observation:
        for batch in batches:
            observation.valid = batch["attention_mask"].bool()
            model(**batch, use_cache=False)
    return found


def correlation(x: list[float], y: list[float]) -> float:
    varied = len(x) > 1 and np.std(x) > 1e-6 and np.std(y) > 1e-6
    return float(np.corrcoef(x, y)[0, 1]) if varied else math.nan


@pytest.mark.parametrize("family", ROUTER_KINDS)
def test_figures_of_routing_are_what_a_loop_over_tokens_finds(family: str) -> None:
    model, batches = tiny_model(family), [tiny_batch(0), tiny_batch(1)]
    layers = collect.collect_statistics(model, batches)
    tables = diagnose_tables.tables(layers, {}, collect.super_experts(layers))
    experts = tables.experts.set_index(["layer", "expert"])
    summary = tables.layers.set_index("layer")
    score = torch.sigmoid if family == "deepseek_v3" else partial_softmax
    for index, tokens in observed(model, batches).items():
        pairs = [
            (expert, weight, norm)
            for seen in tokens
            for expert, weight, norm in zip(seen.experts, seen.weights, seen.norms, strict=True)
        ]
        for expert in range(8):
            mine = [(weight, norm) for one, weight, norm in pairs if one == expert]
            row = experts.loc[(index, expert)]
            assert row["tokens"] == len(mine) and row["dead"] == (not mine)
            assert row["usage"] == pytest.approx(8 * len(mine) / len(pairs))
            if mine:
                weights, norms = zip(*mine, strict=True)
                assert row["mean_weight"] == pytest.approx(np.mean(weights), rel=1e-5)
                assert row["mean_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
                expected = correlation(weights, norms)
                assert row["gate_norm_correlation"] == pytest.approx(
                    expected, abs=1e-4, nan_ok=True
                )
            else:
                assert math.isnan(row["mean_norm"])
        row = summary.loc[index]
        counts = np.bincount([expert for expert, _, _ in pairs], minlength=8)
        assert row["usage_deviation"] == pytest.approx(counts.std() / counts.mean())
        assert row["most_used_share"] == pytest.approx(counts.max() / counts.sum())
        assert row["most_used"] == counts.argmax() and row["dead_experts"] == (counts == 0).sum()
        expected = correlation([w for _, w, _ in pairs], [n for _, _, n in pairs])
        assert row["gate_norm_correlation"] == pytest.approx(expected, abs=1e-5)
        share = [score(seen.logits) / score(seen.logits).sum() for seen in tokens]
        entropy = float(np.mean([-(p * p.log()).sum() for p in share]))
        assert row["gate_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert row["gate_entropy_share"] == pytest.approx(entropy / math.log(8), rel=1e-5)
        by_rank = np.mean([sorted(np.divide(s.weights, sum(s.weights)))[::-1] for s in tokens], 0)
        ranks = tables.ranks[tables.ranks["layer"] == index]
        np.testing.assert_allclose(ranks["share"], by_rank, rtol=1e-5)
        assert list(ranks["rank"]) == list(range(1, len(by_rank) + 1))
        assert row["first_share"] == pytest.approx(by_rank[0], rel=1e-5)


def partial_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_pairs_are_experts_that_one_token_chose(family: str) -> None:
    model, batches = tiny_model(family), [tiny_batch(0)]
    layers = collect.collect_statistics(model, batches)
    tables = diagnose_tables.tables(layers, {}, {})
    seen = observed(model, batches)
    for layer in layers:
        together = dict.fromkeys(combinations(range(8), 2), 0)
        for token in seen[layer.info.index]:
            for pair in combinations(sorted(token.experts), 2):
                together[pair] += 1
        rows = tables.pairs[tables.pairs["layer"] == layer.info.index]
        found = rows.set_index(["expert", "other"])
        assert found["tokens"].to_dict() == together
        assert rows["deviations"].dropna().is_monotonic_decreasing
        # What is expected: every expert in as many pairs as it is, and no pair but by its experts.
        expected = diagnose_tables.coactivation(layer)[1]
        of_expert = [sum(n for pair, n in together.items() if e in pair) for e in range(8)]
        np.testing.assert_allclose(expected.sum(dim=1), of_expert, rtol=2e-3)
        for a, b, c, d in islice(permutations(range(8), 4), 0, None, 7):
            product, other = expected[a, b] * expected[c, d], expected[a, d] * expected[c, b]
            assert product == pytest.approx(float(other), rel=1e-6, abs=1e-9)
        for pair, row in found.iterrows():
            assert row["expected"] == pytest.approx(float(expected[pair]))
            ratio = together[pair] / row["expected"] if row["expected"] >= 0.5 else math.nan
            assert row["lift"] == pytest.approx(ratio, nan_ok=True)


def test_independent_choices_are_expected_as_they_are() -> None:
    """All pairs once: exactly even, where the product of frequencies would expect a third more."""
    info = LayerInfo(0, "x", num_experts=4, top_k=2, hidden_size=2)
    layer = LayerStatistics(info)
    index = torch.tensor(list(combinations(range(4), 2)))
    layer.add_routed(torch.zeros(6, 4), index, torch.full((6, 2), 0.5))
    assert layer["pair_count"].fill_diagonal_(0).unique().tolist() == [0, 1]
    lifts = diagnose_tables.lift(*diagnose_tables.coactivation(layer))
    assert lifts.diagonal().isnan().all()
    np.testing.assert_allclose(lifts[~torch.eye(4, dtype=torch.bool)], 1.0, rtol=1e-6)


def test_planted_twins_and_dead_experts_are_found() -> None:
    model = tiny_model("deepseek_v3")
    layer = moe_layers(model)[1]
    index = layer.info.index
    with torch.no_grad():
        layer.experts.gate_up_proj[6] = -2 * layer.experts.gate_up_proj[1]
        layer.experts.down_proj[6] = layer.experts.down_proj[1]
        layer.experts.gate_up_proj[5] = layer.experts.gate_up_proj[2]
        layer.experts.down_proj[5] = 3 * layer.experts.down_proj[2]
        layer.router.e_score_correction_bias[4] = -100.0
    layers = collect.collect_statistics(model, [tiny_batch(0)])
    similarities = {one.info.index: similarity.of_weights(one) for one in moe_layers(model)}
    tables = diagnose_tables.tables(layers, similarities, {index: (3,)})
    experts = tables.experts.set_index(["layer", "expert"])
    dead = experts.loc[(index, 4)]
    assert dead["dead"] and dead["usage"] == 0 and math.isnan(dead["max_activation"])
    assert experts.loc[(index, 2), "nearest_weight"] == 5
    assert experts.loc[(index, 2), "nearest_weight_cosine"] == pytest.approx(1.0)
    assert "nearest_output" not in experts
    twins = tables.pairs.set_index(["layer", "expert", "other"])
    assert twins.loc[(index, 1, 6), "gate_cosine"] == pytest.approx(-1.0)
    assert twins.loc[(index, 1, 6), "down_cosine"] == pytest.approx(1.0)
    assert list(tables.experts.query("super")["expert"]) == [3]
    row = tables.layers.set_index("layer").loc[index]
    assert row["super_experts"] == 1 and row["dead_experts"] >= 1
    figures = tables.figures()
    assert figures["super_experts"] == 1
    assert figures["dead_experts"] == tables.experts["dead"].sum()
    assert math.isnan(figures["output_similarity"])
    own = [
        np.mean([similarities[i][name][a, b] for name in ("gate", "up", "down")
                 for a, b in permutations(range(8), 2)])
        for i in similarities
    ]  # fmt: skip
    assert figures["weight_similarity"] == pytest.approx(np.mean(own))


def test_constants_correlate_with_nothing() -> None:
    info = LayerInfo(0, "x", num_experts=3, top_k=1, hidden_size=2)
    y = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [6.0, 8.0]])
    expert, weight = torch.tensor([0, 0, 1, 1]), torch.full((4,), 0.1)
    layer = LayerStatistics(info)
    layer.add(Routing(torch.zeros(4, 2), torch.zeros(4, 3), expert[:, None], weight[:, None], y,
                      expert, torch.arange(4), weight))  # fmt: skip
    pooled, of_expert = diagnose_tables.gate_norm_correlation(layer)
    assert pooled.isnan() and of_expert.isnan().all()
