"""Every criterion against its definition, a token and an expert at a time; and what changes none.

The reference routes each token and runs each of its experts by itself, in float64, from the raw
weights; of the model it takes only what enters an MoE block and its norm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from families import tiny_model
from torch import Tensor, nn

from moe_lab.methods.metrics.aimer import aimer
from moe_lab.methods.metrics.ean import ean
from moe_lab.methods.metrics.ean_mean import ean_mean
from moe_lab.methods.metrics.easy_ep import easy_ep
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.gate_sum import gate_sum
from moe_lab.methods.metrics.l1 import l1
from moe_lab.methods.metrics.man import man
from moe_lab.methods.metrics.max_activation import max_activation
from moe_lab.methods.metrics.mone import mone
from moe_lab.methods.metrics.msan import msan
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.router_norm import router_norm
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.metrics.unified import Unified
from moe_lab.methods.metrics.weighted_ean import weighted_ean
from moe_lab.profile.collect import added, collect_statistics, collecting, super_experts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo, Routing, UserError

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "olmoe")
UNIFIED = {
    f"unified {mean} {gate_power} {norm_power}": Unified(mean, gate_power, norm_power)
    for mean in (False, True)
    for gate_power in (0, 1, 2)
    for norm_power in (0, 1, 2)
    if not mean or gate_power or norm_power
}
OF_ROUTERS = {
    "frequency": frequency,
    "soft_count": soft_count,
    "gate_sum": gate_sum,
    "router_norm": router_norm,
    "aimer": aimer,
    "l1": l1,
    **{name: metric for name, metric in UNIFIED.items() if name.endswith(" 0")},
}
CRITERIA: dict[str, Callable[[LayerStatistics], Tensor]] = {
    **OF_ROUTERS,
    "ean": ean,
    "ean_mean": ean_mean,
    "weighted_ean": weighted_ean,
    "reap": reap,
    "man": man,
    "msan": msan,
    "mone": mone,
    "easy_ep": easy_ep,
    "max_activation": max_activation,
    **UNIFIED,
}
UNSEEN = 5  # the expert that deepseek_v3's correction bias keeps from every token
LENGTHS = (4, 13, 7, 2, 9, 11)


@dataclass
class Seen:
    """What the reference saw of one pair of token and expert."""

    gate: float
    output_D: Tensor
    change: float = math.nan

    @property
    def norm(self) -> float:
        return self.output_D.square().sum().sqrt().item()


@functools.cache
def model_of(family: str) -> nn.Module:
    model = tiny_model(family, seed=3)
    if family == "deepseek_v3":
        for decoder in model.model.layers[1:]:
            decoder.mlp.gate.e_score_correction_bias[UNSEEN] = -9.0
    return model


def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]


def batch_of(rows: list[list[int]], left: bool = False, extra: int = 0) -> dict[str, Tensor]:
    """One batch, padded to its longest row and `extra` more."""
    width = max(map(len, rows)) + extra
    empty = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for pad, row in zip(empty, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if left else one + pad for pad, one in zip(empty, ones, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@functools.cache
def whole(family: str) -> list[LayerStatistics]:
    """The statistics of all documents in one batch."""
    return collect_statistics(model_of(family), [batch_of(documents())])


# ------------------------------------------------------------------------ the slow reference


def routed(config, gate: nn.Module, x_D: Tensor) -> tuple[list[float], dict[int, float]]:
    """Full probability of each expert, and the weights of those that one token goes to."""
    logits = [float(row.double() @ x_D) for row in gate.weight.detach()]
    if config.model_type == "deepseek_v3":
        probability = [1 / (1 + math.exp(-logit)) for logit in logits]
        biases = gate.e_score_correction_bias.tolist()
        merit = [p + bias for p, bias in zip(probability, biases, strict=True)]
        size = len(merit) // config.n_group
        groups = [range(start, start + size) for start in range(0, len(merit), size)]
        groups.sort(key=lambda group: -sum(sorted((merit[j] for j in group), reverse=True)[:2]))
        allowed = [j for group in groups[: config.topk_group] for j in group]
        renormalised, factor = config.norm_topk_prob, config.routed_scaling_factor
    else:
        total = sum(math.exp(logit) for logit in logits)
        merit = probability = [math.exp(logit) / total for logit in logits]
        allowed = list(range(len(merit)))
        renormalised, factor = getattr(config, "norm_topk_prob", True), 1.0
    chosen = sorted(allowed, key=lambda j: -merit[j])[: config.num_experts_per_tok]
    scale = factor / (sum(probability[j] for j in chosen) if renormalised else 1.0)
    return probability, {j: probability[j] * scale for j in chosen}


def output(experts: nn.Module, expert: int, x_D: Tensor) -> Tensor:
    gate_D, up_D = (experts.gate_up_proj[expert].double() @ x_D).chunk(2)
    return experts.down_proj[expert].double() @ (gate_D / (1 + torch.exp(-gate_D)) * up_D)


def entering(model: nn.Module) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """By layer, for each token (h, x) in float64: what enters the norm before its MoE block, and
    the block; each document alone, so without padding."""
    caught: dict[int, dict[str, Tensor]] = {}
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    hooks = []
    for number, decoder in enumerate(model.model.layers):
        for name, module in (("h", decoder.post_attention_layernorm), ("x", decoder.mlp)):

            def keep(_, args: tuple, number: int = number, name: str = name) -> None:
                caught.setdefault(number, {})[name] = args[0][0].double()

            hooks.append(module.register_forward_pre_hook(keep))
    for row in documents():
        model(input_ids=torch.tensor([row]))
        for number, states in caught.items():
            found.setdefault(number, []).extend(zip(states["h"], states["x"], strict=True))
    for hook in hooks:
        hook.remove()
    return found


def defined(seen: list[Seen], tokens: int, block: nn.Module, expert: int) -> dict[str, float]:
    """Each criterion of one expert by its definition."""
    experts = block.experts
    weights = torch.cat(
        [experts.gate_up_proj[expert].flatten(), experts.down_proj[expert].flatten()]
    )
    weights = weights.double()
    outputs = torch.stack([one.output_D for one in seen]) if seen else torch.zeros(0, 1)
    spread = (
        torch.stack([column.var() for column in outputs.T]).sum().sqrt() if len(seen) > 1 else 0
    )
    count = max(len(seen), 1)
    found = {
        "frequency": len(seen),
        "gate_sum": sum(one.gate for one in seen),
        "router_norm": block.gate.weight[expert].double().square().sum().sqrt().item(),
        "aimer": -(weights.abs().mean() / weights.square().mean().sqrt()).item(),
        "l1": weights.abs().sum().item(),
        "ean": sum(one.norm for one in seen),
        "ean_mean": sum(one.norm for one in seen) / count,
        "weighted_ean": sum(one.gate * one.norm for one in seen),
        "reap": sum(one.gate * one.norm for one in seen) / count,
        "man": sum(one.norm for one in seen) / count,
        "msan": sum(one.norm**2 for one in seen) / count,
        "mone": float(spread) * sum(one.gate for one in seen) / tokens,
        "easy_ep": sum(one.gate * one.norm * one.change for one in seen),
        "max_activation": max((one.output_D.abs().max().item() for one in seen), default=0.0),
    }
    for name, metric in UNIFIED.items():
        terms = [one.gate**metric.gate_power * one.norm**metric.norm_power for one in seen]
        found[name] = sum(terms) / (count if metric.mean else 1)
    return found


@functools.cache
@torch.no_grad()
def reference(family: str) -> dict[int, dict[str, list[float]]]:
    """By layer and criterion, a score per expert."""
    model = model_of(family)
    found = {}
    for index, tokens in entering(model).items():
        block = model.model.layers[index].mlp
        if not hasattr(block, "experts"):
            continue
        seen: list[list[Seen]] = [[] for _ in range(8)]
        soft_count_E = [0.0] * 8
        for h_D, x_D in tokens:
            probability, weights = routed(model.config, block.gate, x_D)
            soft_count_E = [a + p for a, p in zip(soft_count_E, probability, strict=True)]
            pairs = {j: Seen(gate, output(block.experts, j, x_D)) for j, gate in weights.items()}
            after_D = h_D + sum(one.gate * one.output_D for one in pairs.values())
            cosine = (h_D @ after_D) / (h_D.square().sum() * after_D.square().sum()).sqrt()
            for j, one in pairs.items():
                seen[j].append(replace(one, change=1 - cosine.item()))
        rows = [defined(seen[j], len(tokens), block, j) for j in range(8)]
        found[index] = {name: [row[name] for row in rows] for name in rows[0]}
        found[index]["soft_count"] = soft_count_E
        signed = [max(one.output_D.max().item() for one in pairs) for pairs in seen if pairs]
        largest = [value for value in found[index]["max_activation"] if value]
        assert signed != largest, "some largest component is negative"
    return found


EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@EACH_FAMILY
def test_each_criterion_is_its_definition(family: str) -> None:
    expected = reference(family)
    assert [layer.info.index for layer in whole(family)] == sorted(expected)
    assert len(expected) >= 3
    for layer in whole(family):
        assert set(expected[layer.info.index]) == set(CRITERIA)
        for name, scores in expected[layer.info.index].items():
            wanted = torch.tensor(scores, dtype=torch.float64)
            what = f"{name}, layer {layer.info.index}"
            found = CRITERIA[name](layer)
            assert found.dtype == torch.float64 and found.shape == (8,), what
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-9, msg=what)


def test_an_expert_without_tokens_is_the_lowest() -> None:
    for layer in whole("deepseek_v3"):
        assert layer["count"][UNSEEN] == 0 < layer["count"].sum()
        for name, metric in CRITERIA.items():
            scores = metric(layer)
            assert bool(scores.isfinite().all()), name
            if name not in (
                "soft_count",
                "router_norm",
                "aimer",
                "l1",
            ):  # they need no routed token
                assert scores[UNSEEN] == 0 == scores.min(), name


def test_criteria_that_are_easily_confused_differ() -> None:
    layer = whole("qwen2_moe")[0]
    for one, other in (
        ("reap", "weighted_ean"),
        ("soft_count", "gate_sum"),
        ("weighted_ean", "unified False 2 1"),
        ("man", "ean"),
    ):
        assert not torch.allclose(CRITERIA[one](layer), CRITERIA[other](layer), rtol=0.05)


def test_weights_that_are_all_0_score_lowest() -> None:
    sums = {"weight_abs_sum": [0.0, 3.0], "weight_square_sum": [0.0, 3.0], "weight_count": [3.0]}
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    assert aimer(LayerStatistics(INFO, sums)).tolist() == [-1, -1]


# ----------------------------------------------------------------- what changes no criterion


def assert_alike(found: list[LayerStatistics], others: list[LayerStatistics]) -> None:
    assert [one.info for one in found] == [one.info for one in others] != []
    for one, other in zip(found, others, strict=True):
        assert one.sums.keys() == other.sums.keys()
        assert torch.equal(one["pair_count"], other["pair_count"])
        for name, metric in CRITERIA.items():
            what = f"{name}, layer {one.info.index}"
            torch.testing.assert_close(metric(one), metric(other), rtol=1e-4, atol=1e-7, msg=what)


@EACH_FAMILY
def test_how_the_data_is_cut_and_padded_changes_nothing(family: str) -> None:
    model, rows = model_of(family), documents()
    assert_alike(whole(family), collect_statistics(model, [batch_of([row]) for row in rows]))
    assert_alike(
        whole(family), collect_statistics(model, [batch_of(rows[:4]), batch_of(rows[4:], extra=3)])
    )
    assert_alike(whole(family), collect_statistics(model, [batch_of(rows, left=True, extra=2)]))


@EACH_FAMILY
def test_packing_changes_nothing(family: str) -> None:
    """Documents in one row, each with positions of its own: none attends to another."""
    rows = documents()
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    with collecting(model_of(family)) as collection, collection.batch(torch.ones_like(ids).bool()):
        model_of(family)(input_ids=ids, position_ids=positions, use_cache=False)
    assert_alike(whole(family), collection.of_group())


@EACH_FAMILY
def test_parts_of_the_data_add_up(family: str) -> None:
    model, rows = model_of(family), documents()
    halves = [collect_statistics(model, [batch_of(part)]) for part in (rows[:2], rows[2:])]
    assert_alike(whole(family), added(halves))
    for one, other, both in zip(*halves, added(halves), strict=True):
        larger = torch.maximum(one["max_activation"], other["max_activation"])
        assert torch.equal(both["max_activation"], larger)
        assert torch.equal(both["weight_abs_sum"], one["weight_abs_sum"])
        assert torch.equal(both["output_sum"], one["output_sum"] + other["output_sum"])


@EACH_FAMILY
def test_permuted_experts_have_permuted_scores(family: str) -> None:
    order = [6, 4, 7, 5, 1, 3, 0, 2]  # groups change places, and experts in them
    model = tiny_model(family, seed=3)
    model.load_state_dict(model_of(family).state_dict())
    index = whole(family)[1].info.index
    block = model.model.layers[index].mlp
    with torch.no_grad():
        for tensor in (*block.experts.parameters(), *block.gate.parameters()):
            tensor.copy_(tensor[order].clone())
        for buffer in block.gate.buffers():
            buffer.copy_(buffer[order].clone())
    permuted = collect_statistics(model, [batch_of(documents())])
    for one, other in zip(whole(family), permuted, strict=True):
        for name, metric in CRITERIA.items():
            expected = metric(one)[order] if one.info.index == index else metric(one)
            torch.testing.assert_close(metric(other), expected, rtol=1e-4, atol=1e-7, msg=name)
        pairs = one["pair_count"]
        if one.info.index == index:
            assert not torch.equal(other["pair_count"], pairs)
            pairs = pairs[order][:, order]
        assert torch.equal(other["pair_count"], pairs)


@EACH_FAMILY
def test_the_routers_alone_are_enough_where_it_says_so(family: str) -> None:
    alone = collect_statistics(model_of(family), [batch_of(documents())], only_routers=True)
    for one, other in zip(whole(family), alone, strict=True):
        for name, metric in CRITERIA.items():
            assert getattr(metric, "from_routers", False) is (name in OF_ROUTERS), name
            if name in OF_ROUTERS:
                assert torch.equal(metric(one), metric(other)), name
            else:
                with pytest.raises(UserError, match="has no statistic"):
                    metric(other)


# ---------------------------------------------------------------------------- single sums

INFO = LayerInfo(3, "model.layers.3.mlp", num_experts=2, top_k=1, hidden_size=4)


def sent_to_one(y_TD: Tensor, **states: Tensor) -> LayerStatistics:
    """All tokens to expert 1, with weight 1, in two batches."""
    layer = LayerStatistics(INFO, scoring="softmax")
    for start, part_TD in zip((0, len(y_TD) // 2), y_TD.tensor_split(2), strict=True):
        tokens = len(part_TD)
        ones_T = torch.ones(tokens)
        index_T = torch.ones(tokens, dtype=torch.long)
        parts = {name: state[start : start + tokens] for name, state in states.items()}
        layer.add(
            Routing(part_TD, torch.zeros(tokens, 2), index_T[:, None], ones_T[:, None], part_TD,
                    index_T, torch.arange(tokens), ones_T, **parts)
        )  # fmt: skip
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_stops_counting(dtype: torch.dtype) -> None:
    layer = sent_to_one(torch.tensor([[300.0, -300.0, 0.0, 300.0]], dtype=dtype).expand(2000, 4))
    value = torch.tensor(300.0, dtype=dtype).item()
    assert layer["count"].tolist() == [0, 2000]
    assert layer["norm_square_sum"][1].item() == pytest.approx(2000 * 3 * value**2, rel=1e-12)
    assert layer["output_sum"][1].tolist() == [2000 * value, -2000 * value, 0, 2000 * value]
    assert max_activation(layer).tolist() == [0, value]
    assert mone(layer)[1].item() == pytest.approx(0, abs=1e-4), "its output never changes"


def states() -> Iterator[tuple[Tensor, Tensor]]:
    """What a layer adds to and what it adds [T, 4]: of all relations, down to a part in 10^9."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-3, 1.0, 1e3):
        drawn = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
        yield 1e3 * drawn[0], scale * drawn[1]


def test_a_small_change_is_not_lost_to_rounding() -> None:
    for h_TD, m_TD in states():
        h_TD, m_TD = h_TD.float(), m_TD.float()
        a_TD, m64_TD = h_TD.double(), m_TD.double()
        perpendicular_TD = m64_TD - (a_TD * m64_TD).sum(1, True) / (a_TD * a_TD).sum(1, True) * a_TD
        angle_T = torch.atan2(
            perpendicular_TD.norm(dim=1), (a_TD * (a_TD + m64_TD)).sum(1) / a_TD.norm(dim=1)
        )
        expected = (2 * torch.sin(angle_T / 2) ** 2 * m64_TD.norm(dim=1)).sum()
        found = sent_to_one(
            m_TD, residual_TD=h_TD, entering_TD=h_TD, leaving_TD=h_TD, routed_TD=m_TD
        )
        assert easy_ep(found)[1].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_change_of_direction_is_2_and_one_from_nothing_is_1() -> None:
    h_TD = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    m_TD = torch.tensor([[-6.0, -8.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0]])
    layer = sent_to_one(m_TD, residual_TD=h_TD, entering_TD=h_TD, leaving_TD=h_TD, routed_TD=m_TD)
    assert easy_ep(layer).tolist() == pytest.approx([0, 10 * 2 + 5 * 1])


def with_activations(*rows: list[float]) -> list[LayerStatistics]:
    return [
        LayerStatistics(
            replace(INFO, index=2 * place + 1), {"max_activation": torch.tensor(row).double()}
        )
        for place, row in enumerate(rows)
    ]


def test_super_experts_stand_out_of_the_whole_model() -> None:
    plain = [1.0] * 200
    layers = with_activations(plain, [*plain[1:], 50.0], [60.0, *plain[1:]], [70.0, *plain[1:]])
    # three of 800: the 99.5th percentile is 1, and a tenth of the largest 7
    assert super_experts(layers) == {1: (), 3: (199,), 5: (0,), 7: ()}
    assert super_experts(layers, include_last=True) == {1: (), 3: (199,), 5: (0,), 7: (0,)}
    few = with_activations(*([1.0, 2.0, 3.0, value] for value in (4.0, 50.0, 60.0, 70.0)))
    # of 16 the percentile, 69.25, lies between the two largest
    assert super_experts(few, include_last=True) == {1: (), 3: (), 5: (), 7: (3,)}
    even = with_activations(plain, plain, plain, plain)
    assert not any(super_experts(even, include_last=True).values()), "none is above all others"
    faint = with_activations([*plain[1:], 5.0], plain, plain, [70.0, *plain[1:]])
    assert super_experts(faint, include_last=True)[1] == (), "less than a tenth of the largest"


def test_unified_refuses_what_is_not_collected() -> None:
    for metric in UNIFIED.values():
        metric.check([INFO])
    for powers in ((3, 1), (1, -1)):
        with pytest.raises(UserError, match=r"metric\.gate_power=.*each can be 0, 1 or 2"):
            Unified(True, *powers).check([INFO])
    with pytest.raises(UserError, match=r"mean of 1.*metric\.mean=false"):
        Unified(True, 0, 0).check([INFO])
