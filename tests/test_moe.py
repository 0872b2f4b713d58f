"""The seam to transformers: finding, observing and editing MoE layers of real families."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_batch, tiny_model
from torch import Tensor
from torch.nn import functional as F

from moe_lab.methods.condense.base import shared_gate
from moe_lab.methods.condense.gates import mean_selected
from moe_lab.methods.condense.method import Condense
from moe_lab.models.editing import apply_plan, check_is_sum, condensed, part_widths, prune_layer
from moe_lab.models.layers import check_kept, expert_forward, expert_parameters, moe_layers
from moe_lab.models.observing import observe
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import Edit, LayerInfo, Plan, Routing, UserError

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
CONDENSABLE = [name for name in FAMILIES if name != "gpt_oss"]


def observed(model, batch: dict[str, Tensor]) -> tuple[Tensor, dict[int, Routing]]:
    seen: dict[int, Routing] = {}
    with torch.no_grad(), observe(model, lambda info, r: seen.update({info.index: r})) as opened:
        opened.valid = batch["attention_mask"].bool()
        logits = model(**batch).logits
    return logits, seen


def logits_of(model, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@EACH_FAMILY
def test_finds_the_layers(family: str) -> None:
    infos = [layer.info for layer in moe_layers(tiny_model(family))]
    first = 1 if family in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe") else 0
    assert [info.index for info in infos] == list(range(first, 4))
    assert {info.num_experts for info in infos} == {8}
    assert {info.top_k for info in infos} == {3 if family in ("qwen2_moe", "olmoe") else 2}
    assert {info.hidden_size for info in infos} == {32}
    shared = {"qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"}
    assert all(info.shared == (family in shared) for info in infos)
    assert {info.num_decoders for info in infos} == {4}
    assert {info.expert_width for info in infos} == {16}
    width = {"qwen2_moe": 24}.get(family, 16 if family in shared else 0)
    assert {info.shared_width for info in infos} == {width}
    assert all((info.groups, info.groups_used) == ((2, 1) if family == "deepseek_v3" else (1, 1))
               for info in infos)  # fmt: skip


@EACH_FAMILY
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_observing_changes_no_logit(family: str, implementation: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    model.set_experts_implementation(implementation)
    plain = logits_of(model, batch)
    logits, seen = observed(model, batch)
    if family == "gpt_oss" and implementation == "grouped_mm":
        # Its grouped product over transposed weights rounds otherwise than its own eager loop.
        torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits, plain)
    assert len(seen) == len(moe_layers(model))
    assert model.config._experts_implementation == implementation
    assert torch.equal(logits_of(model, batch), plain)


def slow_router(layer, x: Tensor, config) -> tuple[Tensor, Tensor]:
    """Router weights [E] (0 where not chosen) and full probabilities [E] of one token, float64.

    Written from the families' descriptions, not from their code.
    """
    router = layer.router
    logits = slow_logits(layer, x)
    kind = config.model_type
    if kind in ("deepseek_v3", "glm4_moe"):
        probability = torch.sigmoid(logits)
        choice = probability + router.e_score_correction_bias.double()
        if config.n_group > 1:
            groups = choice.view(config.n_group, -1)
            best = groups.topk(2, dim=1).values.sum(dim=1).topk(config.topk_group).indices
            allowed = torch.zeros_like(groups, dtype=torch.bool)
            allowed[best] = True
            choice = choice.masked_fill(~allowed.view(-1), float("-inf"))
    else:
        probability = choice = torch.softmax(logits, dim=0)
    chosen = choice.topk(layer.info.top_k).indices
    weight = torch.zeros_like(probability)
    weight[chosen] = probability[chosen]
    if kind in ("mixtral", "gpt_oss") or (kind != "deepseek_v2" and config.norm_topk_prob):
        weight = weight / weight.sum()
    if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe"):
        weight = weight * config.routed_scaling_factor
    return weight, probability


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


def slow_logits(layer, x: Tensor) -> Tensor:
    logits = layer.router.weight.detach().double() @ x.double()
    bias = getattr(layer.router, "bias", None)
    return logits if bias is None else logits + bias.detach().double()


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


@EACH_FAMILY
def test_the_slow_experts_make_the_block(family: str) -> None:
    """The reference above stands on its own: summed up, it is the model's block."""
    model = tiny_model(family)
    layer, config = moe_layers(model)[0], model.config
    x_TD = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = layer.block(x_TD[None])
        out = (out[0] if isinstance(out, tuple) else out)[0]
        for x, y in zip(x_TD, out, strict=True):
            weight, _ = slow_router(layer, x, config)
            total = sum(
                weight[e] * expert_forward(layer.experts, p, x[None])[0]
                for e, p in enumerate(expert_parameters(layer.experts))
            )
            if layer.shared is not None:
                gate = layer.shared_gate(x).sigmoid() if layer.shared_gate is not None else 1.0
                total = total + gate * layer.shared(x)
            torch.testing.assert_close(total.float(), y, rtol=1e-4, atol=1e-5)


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


@EACH_FAMILY
def test_pruning_nothing_is_the_identity(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    before = logits_of(model, batch)
    for layer in moe_layers(model):
        prune_layer(layer, range(8))
    assert torch.equal(logits_of(model, batch), before)


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


@pytest.mark.parametrize("family", CONDENSABLE)
def test_condensed_equals_the_sum_of_its_parts(family: str) -> None:
    model = tiny_model(family)
    layer = moe_layers(model)[0]
    experts, gates = [5, 0, 6], [0.2, 0.5, 0.1]
    dense = condensed(layer, experts, gates, shared_gate=0.4)
    x_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        parameters = expert_parameters(layer.experts)
        parts = zip(experts, gates, strict=True)
        expected = sum(g * expert_forward(layer.experts, parameters[e], x_TD) for e, g in parts)
        if layer.shared is not None:
            expected = expected + 0.4 * layer.shared(x_TD)
        torch.testing.assert_close(dense(x_TD), expected, rtol=1e-4, atol=1e-5)
    assert dense.gate_proj.out_features == sum(part_widths(layer.info, experts))


def test_condensing_all_experts_with_the_true_gates_is_the_layer() -> None:
    """Where every token goes to all experts with the same weights, condensing changes nothing."""
    model, batch = tiny_model("qwen2_moe", num_experts_per_tok=8), tiny_batch()
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.zero_()
            layer.shared_gate.weight.zero_()
    before = logits_of(model, batch)
    edits = []
    for found in collect_statistics(model, [batch]):
        gates = mean_selected.choose(found)
        assert gates.tolist() == pytest.approx([1 / 8] * 8)
        assert shared_gate(found) == 0.5
        edits.append(Edit(found.info.index, found.info.name, "condense", experts=tuple(range(8)),
                          gates=tuple(gates.tolist()), shared_gate=0.5))  # fmt: skip
    apply_plan(model, Plan(tuple(edits)))
    torch.testing.assert_close(logits_of(model, batch), before, rtol=1e-4, atol=1e-4)


def test_gpt_oss_cannot_be_condensed_and_says_why() -> None:
    infos = [layer.info for layer in moe_layers(tiny_model("gpt_oss"))]
    with pytest.raises(UserError, match=r"layer 0 .* biases"):
        Condense(1, 2, "greedy_js", "greedy_js").check(infos)


@pytest.mark.parametrize("family", CONDENSABLE)
def test_a_block_that_scales_its_sum_is_refused(family: str) -> None:
    layer = moe_layers(tiny_model(family))[0]
    check_is_sum(layer)
    layer.block.register_forward_hook(lambda _, args, output: output * 1.1)
    with pytest.raises(UserError, match="does more than add"):
        check_is_sum(layer)


def test_too_few_experts_are_refused_with_both_numbers() -> None:
    info = LayerInfo(3, "model.layers.3.mlp", num_experts=8, top_k=3, hidden_size=32)
    check_kept(info, 3)
    with pytest.raises(UserError, match=r"layer 3: 2 of 8 .* chooses 3"):
        check_kept(info, 2)
    grouped = LayerInfo(3, "m", num_experts=8, top_k=3, hidden_size=32, groups=2, groups_used=1)
    check_kept(grouped, 6)
    for impossible in (7, 4):
        with pytest.raises(UserError, match="same number"):
            check_kept(grouped, impossible)


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
