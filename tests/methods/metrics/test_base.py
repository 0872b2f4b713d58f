"""Every criterion against its definition, a token and an expert at a time; and what changes none.

The reference routes each token and runs each of its experts by itself, in float64, from the raw
weights; of the model it takes only what enters an MoE block and its norm.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
from dataclasses import dataclass, replace
from typing import Annotated

import pytest
import torch
from criteria import CRITERIA, OF_ROUTERS, UNIFIED
from expert_sets import Case
from families import tiny_model
from layer_statistics import by_hand
from torch import Tensor, nn

from moe_lab.lookup import module_in, names_in
from moe_lab.methods.metrics.base import (
    FunctionMetric,
    Metric,
    as_metric,
    from_routers,
    names_from_routers,
)
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.leave_one_out import LeaveOneOut
from moe_lab.methods.metrics.naee import Naee
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.editing import prune_layer
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.option import Option
from moe_lab.profile.collect import added, collect_statistics, collecting
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError

FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "olmoe")
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
            assert as_metric(metric).from_routers is (name in OF_ROUTERS), name
            if name in OF_ROUTERS:
                assert torch.equal(metric(one), metric(other)), name
            else:
                with pytest.raises(UserError, match="has no statistic"):
                    metric(other)


def test_each_metric_is_its_formula() -> None:
    layer = by_hand()
    p = torch.tensor([[2.0, 1, 0, -1], [0, 3, 1, -2], [1, 2, 0, 0.5]]).softmax(dim=1).double()
    assert frequency(layer).tolist() == [2, 3, 1, 0]
    torch.testing.assert_close(soft_count(layer), p.sum(dim=0), rtol=1e-6, atol=1e-7)
    # REAP is the mean over routed tokens of weight times norm, the weight taken once.
    expected = [
        (p[0, 0] * 5 + p[2, 0] * 2) / 2,
        (p[0, 1] * 1 + p[1, 1] * 1 + p[2, 1] * 2) / 3,
        p[1, 2] * 10,
        0.0,
    ]
    torch.testing.assert_close(reap(layer), torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-6, atol=1e-7)  # fmt: skip


def test_sums_add_up_over_batches() -> None:
    once, twice = by_hand(), by_hand()
    for name, value in by_hand().sums.items():
        twice.sums[name] = twice.sums[name] + value
    assert torch.equal(reap(once), reap(twice))
    assert torch.equal(2 * frequency(once), frequency(twice))


def test_permuting_the_experts_permutes_the_scores(case: Case) -> None:
    changed = copy.deepcopy(case.model)
    order = [2, 0, 3, 1, 7, 5, 4, 6]  # within each group
    for layer in moe_layers(changed):
        prune_layer(layer, order)
    profile = case.profile()
    theirs = replace(profile, open_stream=lambda number: LayerStream(changed, case.batches))
    for metric in (LeaveOneOut(), Naee(max_subsets=0)):
        for score, other in zip(metric.scores(profile), metric.scores(theirs), strict=True):
            torch.testing.assert_close(other, score[order], rtol=1e-6, atol=1e-9)


def test_answers_are_remembered(caplog: pytest.LogCaptureFixture) -> None:
    case = Case("mixtral")
    streams, answers = [], {}

    def open_stream(number: int | None) -> LayerStream:
        streams.append(number)
        return LayerStream(case.model, case.batches)

    def remember(identity, work, code):
        key = json.dumps(identity, sort_keys=True)
        if key not in answers:
            answers[key] = json.dumps(work())
        return json.loads(answers[key])

    profile = Profile(case.statistics, open_stream, remember=remember)
    with caplog.at_level(logging.INFO):
        first = LeaveOneOut(num_samples=5).scores(profile)
    assert streams == [5] and "8 experts x 48 tokens" in caplog.text
    again = LeaveOneOut(num_samples=5).scores(profile)
    LeaveOneOut("cosine", num_samples=5).scores(profile)
    assert streams == [5]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for ratio in (0.25, 0.5):
        Prune(Naee(), Uniform(ratio)).plan(profile)
    assert streams == [5, 128, 128, 128]  # the order once, and the subsets of each number


def test_refusals() -> None:
    info = Case("mixtral").infos[1]
    with pytest.raises(UserError, match="mse, cosine"):
        LeaveOneOut("kl").check([info])
    with pytest.raises(UserError, match="num_samples=0"):
        LeaveOneOut(num_samples=0).check([info])
    with pytest.raises(UserError, match="none can be left out"):
        LeaveOneOut().check([replace(info, num_experts=2)])
    with pytest.raises(UserError, match="max_subsets=-1"):
        Naee(max_subsets=-1).check([info])
    with pytest.raises(UserError, match="num_samples=0"):
        Naee(num_samples=0).check([info])


def test_what_a_metric_is_unless_it_says_so() -> None:
    @dataclass(frozen=True)
    class Count(Metric):
        power: Annotated[int, Option("a power", least=1)] = 1

        def score(self, layer: LayerStatistics) -> Tensor:
            return layer["count"] ** self.power

    layer, metric = by_hand(), Count(2)
    metric.check([layer.info])
    with pytest.raises(UserError, match=r"^metric\.power=0: it must be at least 1$"):
        Count(0).check([layer.info])
    assert as_metric(metric) is metric
    assert torch.equal(metric(layer), layer["count"] ** 2)
    profile = Profile([layer, layer])
    assert [one.tolist() for one in metric.scores(profile)] == [metric(layer).tolist()] * 2
    assert metric.choose(profile, {}) is None and metric.notes([], {}) == {}
    assert metric.identity({"power": 2}) == {"power": 2}
    assert (metric.needs_model, metric.judges_sets, metric.from_routers) == (False,) * 3
    assert metric.takes_groups
    for asked in (LeaveOneOut(), Naee()):
        assert asked.needs_model and not asked.takes_groups
        with pytest.raises(NotImplementedError, match="no score of one layer"):
            asked(layer)


def test_a_function_is_a_metric() -> None:
    def power(
        layer: LayerStatistics, exponent: Annotated[float, Option("an exponent", above=0)]
    ) -> Tensor:
        return layer["count"] ** exponent

    layer = by_hand()
    bound = functools.partial(power, exponent=2)
    metric = as_metric(bound)
    assert metric == FunctionMetric(bound) and metric(layer).tolist() == [4, 9, 1, 0]
    metric.check([layer.info])
    with pytest.raises(UserError, match=r"^metric\.exponent=0: it must be above 0$"):
        as_metric(functools.partial(power, exponent=0)).check([layer.info])
    assert not metric.from_routers
    assert as_metric(from_routers(power)).from_routers and metric.from_routers
    assert as_metric(frequency)(layer).tolist() == [2, 3, 1, 0]
    for wrong in (None, "reap", Uniform(0.25), LeaveOneOut):
        with pytest.raises(UserError, match=r"^metric is .*derived from .*\.Metric$"):
            as_metric(wrong)


def test_the_metrics_of_routers_are_known() -> None:
    assert names_from_routers() == [
        "aimer", "frequency", "gate_sum", "l1", "random", "router_norm", "router_norm_change",
        "soft_count",
    ]  # fmt: skip


def test_metrics_that_judge_sets_say_so() -> None:
    package = "moe_lab.methods.metrics"
    found = [one for name in names_in(package) for one in vars(module_in(package, name)).values()
             if isinstance(one, type) and issubclass(one, Metric)]  # fmt: skip
    assert Naee in found and LeaveOneOut in found
    for metric in found:
        assert metric.judges_sets == (metric.choose is not Metric.choose), metric
        if metric.scored():  # no base of several
            assert metric.needs_model == any(
                getattr(metric, name) is not getattr(Metric, name)
                for name in ("scores", "neuron_scores")
            ), metric
