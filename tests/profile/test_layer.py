"""The sums of one layer: ranks, half precision, experts without tokens."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from families import tiny_batch, tiny_model
from host_reads import host_reads
from layer_statistics import FOUR, by_hand, sent_to_one
from slow_neurons import NEURON_FAMILIES, slow_sums

from moe_lab.methods.metrics.max_activation import max_activation
from moe_lab.methods.metrics.mone import mone
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.models.layers import moe_layers
from moe_lab.profile import layer as layer_module
from moe_lab.profile.collect import added, collect_statistics
from moe_lab.profile.layer import NEURON_STATISTICS, LayerStatistics
from moe_lab.types import NotFinite, Routing, UserError


def test_an_expert_without_tokens_scores_zero_and_divides_nothing() -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight[5] = 0
            layer.router.weight[5, 0] = -1e4
            layer.block.register_forward_pre_hook(lambda _, args: (args[0].abs() + 1e-3,))
    for found in collect_statistics(model, [batch]):
        assert found["count"][5] == 0
        for name in ("gate_sum", "norm_sum", "gate_norm_sum"):
            assert found.mean(name)[5] == 0
            assert torch.isfinite(found.mean(name)).all()


def test_unknown_statistics_are_named() -> None:
    found = collect_statistics(tiny_model("mixtral"), [tiny_batch()])[0]
    with pytest.raises(UserError, match="no statistic 'colour'"):
        found["colour"]
    assert isinstance(found, LayerStatistics)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_stops_counting(dtype: torch.dtype) -> None:
    layer = sent_to_one(torch.tensor([[300.0, -300.0, 0.0, 300.0]], dtype=dtype).expand(2000, 4))
    value = torch.tensor(300.0, dtype=dtype).item()
    assert layer["count"].tolist() == [0, 2000]
    assert layer["norm_square_sum"][1].item() == pytest.approx(2000 * 3 * value**2, rel=1e-12)
    assert layer["output_sum"][1].tolist() == [2000 * value, -2000 * value, 0, 2000 * value]
    assert max_activation(layer).tolist() == [0, value]
    assert mone(layer)[1].item() == pytest.approx(0, abs=1e-4), "its output never changes"


def test_a_soft_count_without_probability_is_refused() -> None:
    layer = by_hand()
    for name in ("probability_sum", "entropy_sum"):
        del layer.sums[name]
        with pytest.raises(UserError, match="no full probability"):
            layer[name]
    with pytest.raises(UserError, match="no full probability"):
        soft_count(layer)


def test_ranks_go_by_weight_and_ties_by_the_routers_order() -> None:
    layer = by_hand()  # two of its tokens give the heavier expert first, one gives it second
    assert layer["rank_count"].tolist() == [[1, 2, 0, 0], [1, 1, 1, 0]]
    tied = LayerStatistics(FOUR)
    tied.add_routed(torch.zeros(1, 4), torch.tensor([[3, 1]]), torch.tensor([[0.25, 0.25]]))
    assert tied["rank_count"].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert tied["entropy_sum"].item() == pytest.approx(math.log(4))


def routed(logits_TE: torch.Tensor) -> LayerStatistics:
    """What a softmax router with two experts a token makes of some logits."""
    info = moe_layers(tiny_model("mixtral"))[1].info
    weight_TK, index_TK = logits_TE.softmax(dim=1).topk(2)
    statistics = LayerStatistics(info, scoring="softmax")
    statistics.add_routed(logits_TE, index_TK, weight_TK)
    return statistics


def test_a_masked_expert_and_one_without_tokens_are_no_numbers_that_are_none() -> None:
    logits_TE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    logits_TE[:, 2], logits_TE[:, 4] = -torch.inf, -50.0
    statistics = routed(logits_TE)
    statistics.check_finite()
    assert statistics["count"][[2, 4]].tolist() == [0, 0]
    assert statistics["probability_sum"][2] == 0
    others = logits_TE.double().masked_fill(logits_TE == -torch.inf, 0)
    torch.testing.assert_close(statistics["logit_product_sum"], others.T @ others)
    assert statistics.logit_cosine().isfinite().all()


def test_scores_that_are_all_too_small_have_no_entropy_and_no_nan() -> None:
    info = moe_layers(tiny_model("mixtral"))[1].info
    statistics = LayerStatistics(info, scoring="sigmoid")
    logits_TE = torch.full((3, 8), -1e4)
    statistics.add_routed(logits_TE, torch.zeros(3, 2).long(), torch.full((3, 2), 0.5))
    statistics.check_finite()
    assert statistics["entropy_sum"].item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_none_is_told_of_its_expert(value: float) -> None:
    logits_TE = torch.randn(6, 8)
    logits_TE[3, 5] = value
    with pytest.raises(NotFinite, match=r"layer 1, expert 5: the router's logit is"):
        routed(logits_TE).check_finite()


@pytest.mark.parametrize("family", NEURON_FAMILIES)
def test_hidden_units_are_those_of_loops_over_tokens(family: str) -> None:
    """With padding, on softmax, sigmoid and biased families."""
    model, batch = tiny_model(family), tiny_batch()
    slow = slow_sums(model, batch)
    for found in collect_statistics(model, [batch], neurons=True):
        for name, expected in slow[found.info.index].items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6 * scale)
    plain = collect_statistics(model, [batch])
    assert not any(one.has_neurons for one in plain), "only where they are asked for"
    with pytest.raises(UserError, match="without the hidden units"):
        plain[0]["hidden_sum"]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_hidden_units_of_two_batches_add_up(family: str) -> None:
    model, batches = tiny_model(family), [tiny_batch(0), tiny_batch(1)]
    both = collect_statistics(model, batches, neurons=True)
    parts = added([collect_statistics(model, [one], neurons=True) for one in batches])
    for one, other in zip(both, parts, strict=True):
        assert one.sums.keys() == other.sums.keys()
        for name in NEURON_STATISTICS:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-8)


def test_shared_hidden_units_are_those_of_one_expert_that_sees_all_tokens() -> None:
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    caught: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = moe_layers(model)
    for layer in layers:

        def keep(module, args, output, index=layer.info.index) -> None:
            caught[index] = args[0].reshape(-1, 32), output

        layer.shared_gate.register_forward_hook(keep)
    statistics = collect_statistics(model, [batch], neurons=True)
    valid = batch["attention_mask"].flatten().bool()
    for layer, found in zip(layers, statistics, strict=True):
        x_TD, gate_T1 = (part[valid].double() for part in caught[layer.info.index])
        weights = {n: m.weight.double() for n, m in layer.shared.named_children() if "proj" in n}
        hidden = torch.nn.functional.silu(x_TD @ weights["gate_proj"].T)
        hidden = hidden * (x_TD @ weights["up_proj"].T)
        shared = found.shared()
        assert shared["count"].item() == valid.sum()
        gated = (hidden * gate_T1.sigmoid()).square()
        for name, expected in (
            ("hidden_square_sum", hidden.square().sum(dim=0)),
            ("gate_hidden_square_sum", gated.sum(dim=0)),
            ("gate_hidden_max", gated.amax(dim=0).sqrt()),
            ("down_square_sum", weights["down_proj"].square().sum(dim=0)),
        ):
            torch.testing.assert_close(shared[name][0], expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(UserError, match="no shared experts whose hidden units"):
        collect_statistics(tiny_model("mixtral"), [batch], neurons=True)[0].shared()


def routing_of(tokens: int, num_experts: int, dtype: torch.dtype) -> Routing:
    """A batch of random numbers; the last expert gets no token."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    logits_TE = draw(tokens, num_experts)
    logits_TE[:, -1] = -30.0
    weight_TK, index_TK = logits_TE.float().softmax(dim=1).topk(3)
    expert_S, order_S = index_TK.flatten().sort(stable=True)
    token_S, weight_S = order_S // 3, weight_TK.flatten()[order_S]
    pairs = draw(len(expert_S), 10), expert_S, token_S, weight_S
    around = [draw(tokens, 10) for _ in range(4)]
    return Routing(
        draw(tokens, 10), logits_TE, index_TK, weight_TK, *pairs, None, *around,
        hidden_SI=draw(len(expert_S), 7), shared_hidden_TI=draw(tokens, 5),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [1, 64, 2**17])
def test_sums_are_those_of_a_loop_over_experts(
    dtype: torch.dtype, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are taken at a time."""
    monkeypatch.setattr(layer_module, "CACHED", cached)
    info = replace(moe_layers(tiny_model("mixtral"))[1].info, top_k=3)
    one = routing_of(60, info.num_experts, dtype)
    found = LayerStatistics(info, scoring="softmax")
    found.add(one)
    for expert in range(info.num_experts):
        rows = [row for row, number in enumerate(one.expert_S.tolist()) if number == expert]
        assert found["count"][expert].item() == len(rows)
        y_ND, h_NI = one.y_SD[rows].double(), one.hidden_SI[rows].double()
        gate_N, norm_N = one.weight_S[rows].double(), y_ND.norm(dim=1)
        expected = {
            "norm_sum": norm_N.sum(), "gate_norm_sum": (gate_N * norm_N).sum(),
            "gate_square_norm_square_sum": (gate_N * norm_N).square().sum(),
            "output_sum": y_ND.sum(dim=0), "hidden_sum": h_NI.sum(dim=0),
            "gate_hidden_square_sum": (gate_N[:, None] * h_NI).square().sum(dim=0),
        }  # fmt: skip
        largest = {
            "max_activation": y_ND.flatten(), "hidden_max": h_NI,
            "gate_hidden_max": gate_N[:, None] * h_NI,
        }  # fmt: skip
        for name, value in largest.items():
            no_token = torch.zeros(value.shape[1:])
            expected[name] = value.abs().amax(dim=0) if rows else no_token
        for name, value in expected.items():
            torch.testing.assert_close(found[name][expert], value.double(), rtol=1e-12, atol=1e-12)


def test_sums_stay_where_they_are_computed_until_somebody_reads_them() -> None:
    """A GPU is waited for once a pass. The meta device is one without any numbers to wait for."""
    info = moe_layers(tiny_model("mixtral"))[1].info
    one = LayerStatistics(replace(info, top_k=3), scoring="softmax")
    values = dataclasses.asdict(routing_of(60, info.num_experts, torch.float32))
    on_meta = {key: value if value is None else value.to("meta") for key, value in values.items()}
    with host_reads() as read:
        for _ in range(2):
            one.add(Routing(**on_meta))
    assert read.number == 0
