"""Statistics against a router of our own, however the data is cut, and on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counting import OF_ROUTERS, assert_alike, batches
from families import EACH_FAMILY, logits_of, tiny_batch, tiny_model
from layer_statistics import TWO
from running import start_two
from slow_router import observed, slow_logits, slow_router
from stand_ins import saved, slow_expert
from torch import Tensor
from torch.nn import functional as F

from moe_lab.compute import Compute
from moe_lab.evaluate.held_out import compare_held_out
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.none import Nothing
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.checkpoint import load, resolve
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.profile import collect
from moe_lab.profile.collect import (
    added,
    collect_statistics,
    load_statistics,
    super_experts,
)
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.stages.profile import collect_profile as profile

# One of each kind of router, and what of the family's config makes it so.
KINDS: dict[str, tuple[str, dict]] = {
    "softmax": ("qwen2_moe", {}),
    "softmax of another family": ("olmoe", {}),
    "renormalised": ("qwen3_moe", {}),
    "renormalised without saying so": ("mixtral", {}),
    "sigmoid with bias": ("glm4_moe", {}),
    "one of two groups": ("deepseek_v3", {}),
    "two of four groups": ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
}


def block_inputs(model, data: Iterable[dict[str, Tensor]]) -> dict[int, Tensor]:
    """What enters each MoE block [T, D] in float64, of data tokens, by the model's own layers."""
    caught: dict[int, list[Tensor]] = {}
    found: dict[int, list[Tensor]] = {}
    hooks = []
    for number, decoder in enumerate(model.model.layers):

        def keep(module, args: tuple, number: int = number) -> None:
            caught[number] = args[0].double()

        hooks.append(decoder.mlp.register_forward_pre_hook(keep))
    for batch in data:
        with torch.no_grad():
            model(**batch)
        for number, x_BLD in caught.items():
            found.setdefault(number, []).append(x_BLD[batch["attention_mask"].bool()])
    for hook in hooks:
        hook.remove()
    return {number: torch.cat(parts) for number, parts in found.items()}


def route(config, gate, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E], full probability [T, E] and weights [T, E], 0 where not chosen; float64."""
    logits_TE = x_TD @ gate.weight.detach().double().T
    if config.model_type in ("glm4_moe", "deepseek_v3"):
        probability_TE = 1 / (1 + torch.exp(-logits_TE))
        choice_TE = probability_TE + gate.e_score_correction_bias.double()
        for row in choice_TE if config.n_group > 1 else ():
            groups = row.view(config.n_group, -1)  # a view: what is written goes into choice_TE
            value = groups.sort(dim=1, descending=True).values[:, :2].sum(dim=1)
            groups[value.sort(descending=True).indices[config.topk_group :]] = -torch.inf
        renormalised, factor = config.norm_topk_prob, config.routed_scaling_factor
    else:
        exponential = torch.exp(logits_TE - logits_TE.amax(dim=1, keepdim=True))
        choice_TE = probability_TE = exponential / exponential.sum(dim=1, keepdim=True)
        renormalised, factor = getattr(config, "norm_topk_prob", True), 1.0
    chosen_TK = choice_TE.sort(dim=1, descending=True).indices[:, : config.num_experts_per_tok]
    is_chosen_TE = torch.zeros_like(choice_TE).scatter(1, chosen_TK, 1.0)
    weight_TE = probability_TE * is_chosen_TE
    if renormalised:
        weight_TE = weight_TE / weight_TE.sum(dim=1, keepdim=True)
    return logits_TE, probability_TE, factor * weight_TE


def expected(config, block, x_TD: Tensor) -> dict[str, Tensor]:
    """All that the router's statistics hold of these tokens, and of the layer's weights."""
    gate, experts = block.gate, block.experts
    weights_E = [
        torch.cat([experts.gate_up_proj[number].flatten(), experts.down_proj[number].flatten()])
        for number in range(8)
    ]
    weights_EW = torch.stack(weights_E).detach().double()
    logits_TE, probability_TE, weight_TE = route(config, gate, x_TD)
    heaviest_TE, order_TE = weight_TE.sort(dim=1, descending=True)
    num_chosen = config.num_experts_per_tok
    share_TE = probability_TE / probability_TE.sum(dim=1, keepdim=True)
    places = [
        [(order_TE[:, place] == expert).sum().item() for expert in range(8)]
        for place in range(num_chosen)
    ]
    return {
        "tokens": torch.tensor([float(len(x_TD))]).double(),
        "count": (weight_TE > 0).sum(dim=0).double(),
        "gate_sum": weight_TE.sum(dim=0),
        "gate_square_sum": weight_TE.square().sum(dim=0),
        "probability_sum": probability_TE.sum(dim=0),
        "pair_count": torch.tensor(
            [
                [((weight_TE[:, one] > 0) & (weight_TE[:, other] > 0)).sum() for other in range(8)]
                for one in range(8)
            ]
        ).double(),
        "logit_product_sum": logits_TE.T @ logits_TE,
        "entropy_sum": -(share_TE * share_TE.log()).sum()[None],
        "rank_count": torch.tensor(places).double(),
        "rank_share_sum": (
            heaviest_TE[:, :num_chosen] / heaviest_TE[:, :num_chosen].sum(dim=1, keepdim=True)
        ).sum(dim=0),
        "router_norm": gate.weight.detach().double().square().sum(dim=1).sqrt(),
        "weight_abs_sum": weights_EW.abs().sum(dim=1),
        "weight_square_sum": weights_EW.square().sum(dim=1),
        "weight_count": torch.tensor([float(weights_EW.shape[1])]).double(),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only_routers", [False, True])
def test_counts_equal_an_independent_router(kind: str, only_routers: bool) -> None:
    family, changes = KINDS[kind]
    model = tiny_model(family, **changes)
    x = block_inputs(model, batches(3))
    found = collect_statistics(model, batches(3), only_routers)
    assert len(found) >= 3
    for layer in found:
        block = model.model.layers[layer.info.index].mlp
        sums = expected(model.config, block, x[layer.info.index])
        assert set(OF_ROUTERS) == set(sums)
        for name in ("tokens", "count", "rank_count", "pair_count", "weight_count"):
            assert torch.equal(layer[name], sums[name]), name
        for name, value in sums.items():
            torch.testing.assert_close(layer[name], value, rtol=1e-5, atol=1e-5, msg=name)
        assert frequency(layer).tolist() == sums["count"].tolist()
        torch.testing.assert_close(soft_count(layer), sums["probability_sum"], rtol=1e-5, atol=0)


@EACH_FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_routers_pass_gives_what_the_full_pass_gives(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    if family == "gpt_oss":  # the default product over transposed weights rounds otherwise
        model.set_experts_implementation("eager")
    full, alone = (
        collect_statistics(model, batches(3)),
        collect_statistics(model, batches(3), only_routers=True),
    )
    assert [one.info for one in full] == [one.info for one in alone]
    for one, other in zip(full, alone, strict=True):
        assert set(other.sums) == set(OF_ROUTERS) < set(one.sums)
        assert all(torch.equal(one[name], other[name]) for name in OF_ROUTERS)


@EACH_FAMILY
def test_the_routers_pass_ends_at_the_last_router(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad():
        before = model(**batch).logits
    computed = []
    layers = moe_layers(model)
    for number, layer in enumerate(layers):
        layer.experts.register_forward_pre_hook(lambda *_, number=number: computed.append(number))
    for module in (model.model.norm, model.lm_head):
        module.register_forward_pre_hook(lambda *_: computed.append("after"))
    collect_statistics(model, [batch], only_routers=True)
    assert computed == list(range(len(layers) - 1))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert computed[-1] == "after", "and no hook of ours is left"


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "glm4_moe", "deepseek_v3"])
@pytest.mark.parametrize("only_routers", [False, True])
def test_counts_do_not_depend_on_batches_and_padding(family: str, only_routers: bool) -> None:
    model = tiny_model(family)
    once = collect_statistics(model, batches(1), only_routers)
    for size in (1, 3, 8):
        for left in (False, True):
            assert_alike(
                collect_statistics(model, batches(size, left), only_routers), once, rtol=1e-5
            )


PROCESS = """
import sys
from pathlib import Path
import torch
import counting
torch.set_num_threads(1)
counting.count_half(Path(sys.argv[1]))
"""


def test_two_processes_count_as_one(tmp_path: Path) -> None:
    started = start_two(PROCESS, str(tmp_path))
    one = collect_statistics(tiny_model("deepseek_v3"), batches(3), only_routers=True)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    for rank in ("0", "1"):
        assert_alike(load_statistics(tmp_path / rank), one, rtol=1e-12)


def test_parts_add_up_to_the_whole() -> None:
    model = tiny_model("qwen2_moe")
    whole = collect_statistics(model, batches(3))
    parts = [collect_statistics(model, [batch]) for batch in batches(3)]
    assert_alike(added([*parts, []]), whole, rtol=1e-12)
    assert added([whole])[0].sums.keys() == whole[0].sums.keys(), "alone: as it is"


@EACH_FAMILY
def test_statistics_equal_a_slow_reference(family: str) -> None:
    model = tiny_model(family)
    batches = [tiny_batch(seed=seed) for seed in range(2)]
    inputs: dict[int, list[Tensor]] = {}
    for batch in batches:
        _, seen = observed(model, batch)
        for index, routing in seen.items():
            inputs.setdefault(index, []).append(routing.x_TD)
    for layer, found in zip(moe_layers(model), collect_statistics(model, batches), strict=True):
        x_TD = torch.cat(inputs[layer.info.index])
        assert len(x_TD) == sum(int(batch["attention_mask"].sum()) for batch in batches)
        sums = slow_sums(layer, x_TD, model.config)
        for name, value in sums.items():
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-5, msg=name)
        assert torch.equal(found["count"], sums["count"])
        logits_TE = torch.stack([slow_logits(layer, x) for x in x_TD])
        cosine = F.cosine_similarity(logits_TE.T[:, None], logits_TE.T[None], dim=-1)
        torch.testing.assert_close(found.logit_cosine(), cosine, rtol=1e-5, atol=1e-5)


@EACH_FAMILY
def test_cosines_around_a_layer_equal_a_slow_reference(family: str) -> None:
    """The state without the MoE sublayer is found by making its block add zeros."""
    model, batch = tiny_model(family), tiny_batch()
    found = {one.info.index: one for one in collect_statistics(model, [batch])}
    model.double().set_experts_implementation("eager")
    for layer in moe_layers(model):
        states: list[Tensor] = []

        def keep(module, args: tuple, output, states: list[Tensor] = states) -> None:
            states.extend([args[0], output[0] if isinstance(output, tuple) else output])

        def empty(module, args: tuple, output) -> object:
            pair = isinstance(output, tuple)
            return (output[0] * 0, *output[1:]) if pair else output * 0

        hook = layer.decoder.register_forward_hook(keep)
        logits_of(model, batch)
        zero = layer.block.register_forward_hook(empty)
        logits_of(model, batch)
        zero.remove()
        hook.remove()
        entering, leaving, _, residual = states
        totals = {"block": 0.0, "layer": 0.0}
        for row, position in batch["attention_mask"].nonzero().tolist():
            after = leaving[row, position]
            for name, before in (("block", entering), ("layer", residual)):
                one = before[row, position]
                totals[name] += float(one @ after / (one.norm() * after.norm()))
        for name, total in totals.items():
            mean = total / int(batch["attention_mask"].sum())
            assert found[layer.info.index].mean_cosine(name) == pytest.approx(mean, abs=1e-6)
            assert mean < 0.999  # else the test could not tell them apart


def slow_sums(layer, x_TD: Tensor, config) -> dict[str, Tensor]:
    names = ("count", "gate_sum", "probability_sum", "norm_sum", "gate_norm_sum")
    sums = {name: torch.zeros(8, dtype=torch.float64) for name in names}
    parameters = [
        {key: value.detach().double() for key, value in expert.items()}
        for expert in expert_parameters(layer.experts)
    ]
    for x in x_TD:
        weight, probability = slow_router(layer, x, config)
        sums["probability_sum"] += probability
        for expert in weight.nonzero().flatten().tolist():
            with torch.no_grad():
                y = expert_forward(layer.experts, parameters[expert], x.double()[None])
            sums["count"][expert] += 1
            sums["gate_sum"][expert] += weight[expert]
            sums["norm_sum"][expert] += y.norm()
            sums["gate_norm_sum"][expert] += weight[expert] * y.norm()
    return sums


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_padding_and_batching_do_not_matter(family: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch(batch=4)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    alone = [
        {key: value[i : i + 1, :length] for key, value in batch.items()}
        for i, length in enumerate(lengths)
    ]
    left = {key: torch.stack([row.roll(10 - n) for row, n in zip(value, lengths, strict=True)])
            for key, value in batch.items()}  # fmt: skip
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    runs = [collect_statistics(model, data) for data in ([batch], alone, [left])]
    for one, *others in zip(*runs, strict=True):
        for other in others:
            for name in one.sums:
                torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)
            assert torch.equal(one["count"], other["count"])


def test_permuting_experts_permutes_the_statistics() -> None:
    model, batches = tiny_model("qwen2_moe"), [tiny_batch()]
    before = collect_statistics(model, batches)
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    for layer in moe_layers(model):
        prune_layer(layer, order)
    for one, other in zip(before, collect_statistics(model, batches), strict=True):
        for name in ("count", "gate_sum", "probability_sum", "norm_sum", "gate_norm_sum"):
            torch.testing.assert_close(other[name], one[name][order], rtol=1e-5, atol=1e-6)


def with_activations(*rows: list[float]) -> list[LayerStatistics]:
    return [
        LayerStatistics(
            replace(TWO, index=2 * place + 1), {"max_activation": torch.tensor(row).double()}
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
    loud = with_activations([*plain[1:], 8.0], plain, plain, [70.0, *plain[1:]])
    assert super_experts(loud, include_last=True)[1] == (199,), "more than a tenth of it"


def test_statistics_and_plans_survive_the_disk(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    found = collect.collect_statistics(model, [tiny_batch()])
    collect.save_statistics(found, tmp_path)
    again = collect.load_statistics(tmp_path)
    assert [layer.info for layer in again] == [layer.info for layer in found]
    for one, other in zip(found, again, strict=True):
        assert one.sums.keys() == other.sums.keys()
        assert all(torch.equal(one[name], other[name]) for name in one.sums)
    plan = Prune(metric=reap, ratio=Uniform(0.25)).plan(Profile(again))
    (tmp_path / "plan.json").write_text(plan.to_text())
    assert Plan.load(tmp_path / "plan.json") == plan
    assert all(len(edit.kept) == 6 and edit.kind == "prune" for edit in plan.edits)
    assert not Nothing().plan(Profile(again)).edited()


@torch.no_grad()
def test_statistics_count_every_row_as_an_expert(tmp_path: Path) -> None:
    saved("deepseek_v2", tmp_path / "x")
    model, batch = load(tmp_path / "x" / "model"), tiny_batch(padding=False)
    seen: dict[int, tuple[Tensor, ...]] = {}
    handles = [
        layer.experts.register_forward_pre_hook(
            lambda module, args, index=layer.info.index: seen.update({index: args})
        )
        for layer in moe_layers(model)
    ]
    found = collect_statistics(model, [batch])
    for handle in handles:
        handle.remove()
    for layer, one in zip(moe_layers(model), found, strict=True):
        x_TD, index_TK, weight_TK = seen[layer.info.index]
        count, norm = torch.zeros(8), torch.zeros(8, dtype=torch.float64)
        for x, rows, weights in zip(x_TD, index_TK.tolist(), weight_TK, strict=True):
            for row, weight in zip(rows, weights, strict=True):
                count[row] += 1
                norm[row] += weight * slow_row(layer, row, x).norm()
        assert one["count"].tolist() == count.tolist()
        torch.testing.assert_close(one["gate_norm_sum"], norm, rtol=1e-5, atol=1e-5)
    figures = compare_held_out(model, [batch]).figures
    gone = sum(
        (layer.experts.place_E[seen[layer.info.index][1]] >= layer.experts.num_experts).sum()
        for layer in moe_layers(model)
    )
    assert figures["routing/stand_ins"] == pytest.approx(int(gone) / 30 / len(found))
    # Layer by layer from the checkpoint it is the same.
    compute = Compute(layerwise=True, device="cpu")
    streamed = profile(resolve(tmp_path / "x" / "model"), [(0, batch)], False, compute, tmp_path)
    for one, other in zip(found, streamed.of_group(), strict=True):
        assert one.sums.keys() == other.sums.keys()
        for name in one.sums:
            assert torch.equal(one[name], other[name]), name


def slow_row(layer: MoELayer, row: int, x: Tensor) -> Tensor:
    place, number = int(layer.experts.place_E[row]), layer.experts.num_experts
    if place < number:
        return slow_expert(layer, place, x)
    stand_in = layer.experts.stand_in
    if stand_in == "constant":
        return layer.experts.constants[place - number]
    return x if stand_in == "copy" else torch.zeros_like(x)
