"""Families with an adapter: what is true of each, against stock transformers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from odd_families import (
    ADAPTED,
    chosen_by_stock,
    in_stock,
    masked_logits,
    odd_model,
    stock_routers,
)
from torch import Tensor, nn
from transformers import AutoConfig

from moe_lab.compute import Compute
from moe_lab.models.adapters.base import REFUSED, adapt
from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.forms import form_of
from moe_lab.models.layers import check_kept, moe_layers
from moe_lab.models.routers import at_top_k, masked_layer, restricted, scoring
from moe_lab.models.saving import save_checkpoint
from moe_lab.profile.collect import collect_statistics, collecting
from moe_lab.stages.profile import collect_profile
from moe_lab.types import UserError

EACH = pytest.mark.parametrize("family", ADAPTED)
CAUSAL = pytest.mark.parametrize("family", [name for name in ADAPTED if name != "step3p7"])
EXACT = {"llama4_text": False}  # stock runs all of its experts on all tokens: rounded otherwise
KEPT = (0, 2, 3, 5, 6, 7)
GROUPS = ((0, 1, 2), (3,), (5, 4), (7, 6))


def close(family: str, one: Tensor, other: Tensor) -> None:
    """Equal; to rounding where stock multiplies other matrices."""
    if EXACT.get(family, True):
        assert torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@EACH
def test_a_model_keeps_its_function_and_its_parameters(family: str) -> None:
    model = odd_model(family)
    before, plain = {k: v.data_ptr() for k, v in model.state_dict().items()}, logits_of(model)
    layers = moe_layers(model)
    assert {name: one.data_ptr() for name, one in model.state_dict().items()} == before
    assert list(model.state_dict()) == list(before)
    close(family, logits_of(model), plain)
    kinds = [type(module) for module in model.modules()]
    adapt(model)  # once more
    assert [type(module) for module in model.modules()] == kinds
    first = 1 if family == "step3p7" else 0
    assert [layer.info.index for layer in layers] == list(
        range(first, 3 if family == "longcat_flash" else 4)
    )
    for info in (layer.info for layer in layers):
        assert (info.num_experts, info.hidden_size, info.expert_width) == (8, 32, 16)
        assert info.top_k == {"llama4_text": 1, "longcat_flash": 3}.get(family, 2)
        assert info.expert_parameters == 3 * 16 * 32 + 32  # and its row of the router


def test_what_needs_no_adapter_is_left_alone() -> None:
    model = tiny_model("mixtral")
    kinds = [type(module) for module in model.modules()]
    adapt(model)
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(vars(model), "_can_set_experts_implementation")


@EACH
def test_observed_logits_are_the_plain_ones_and_counts_those_of_stock(family: str) -> None:
    batches = [tiny_batch(seed) for seed in (0, 1)]
    stock, counts, valid = odd_model(family), dict[int, Tensor](), torch.zeros(0)
    for index, router in stock_routers(stock).items():

        def count(module: nn.Module, args: object, output: object, index: int = index) -> None:
            chosen = chosen_by_stock(family, output)[valid.flatten()]
            counts[index] = counts.get(index, 0) + torch.bincount(chosen.flatten(), minlength=12)

        router.register_forward_hook(count)
    for batch in batches:
        valid = batch["attention_mask"].bool()
        logits_of(stock, batch)
    model = odd_model(family)
    moe_layers(model)
    plain = [logits_of(model, batch) for batch in batches]
    with collecting(model) as collection:
        for batch, expected in zip(batches, plain, strict=True):
            with collection.batch(batch["attention_mask"].bool()):
                assert torch.equal(logits_of(model, batch), expected)
    layers = collection.of_group()
    assert [layer.info.index for layer in layers] == sorted(counts)
    for layer in layers:
        assert torch.equal(layer["count"].long(), counts[layer.info.index][:8])
        assert layer["count"].min() >= 0 and layer["count"].max() > 0
        assert layer.scoring is not None


@EACH
def test_the_block_is_made_of_its_experts(family: str) -> None:
    """What expert_parameters and expert_forward say, summed up by hand, is what it computes."""
    layer = moe_layers(odd_model(family))[1]
    x_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    parameters = expert_parameters(layer.experts)
    assert len(parameters) == 8
    with torch.no_grad():
        _, weight_TK, index_TK = layer.router(x_TD)[:3]
        got = layer.experts(x_TD, index_TK, weight_TK)
        for x, y, weights, chosen in zip(x_TD, got, weight_TK, index_TK.tolist(), strict=True):
            total = torch.zeros(32)
            for weight, expert in zip(weights, chosen, strict=True):
                if expert >= 8:
                    total += weight * x
                elif family == "llama4_text":
                    total += expert_forward(layer.experts, parameters[expert], weight * x[None])[0]
                else:
                    total += weight * expert_forward(layer.experts, parameters[expert], x[None])[0]
            torch.testing.assert_close(total, y, rtol=1e-4, atol=1e-4)


def edited(family: str, home: Path, edits_of: str) -> tuple[Path, Tensor, bool, dict]:
    """A model that was edited and saved: where, its logits before, whether stock, what is kept."""
    if not (home / "dense").is_dir():
        odd_model(family).save_pretrained(home / "dense")
    point = Checkpoint(home / "dense")
    infos, edits = point.layers(), []
    kept = {info.index: KEPT for info in infos}
    if edits_of == "unequal":
        kept |= {info.index: (1, 3, 4, 6) for info in infos[::2]}
    for info in infos:
        if edits_of == "merge":
            kept[info.index] = tuple(group[0] for group in GROUPS)
            weights = tuple((1 / len(group),) * len(group) for group in GROUPS)
            merged = {"groups": GROUPS, "weights": weights, "align": "weights"}
            edits.append(MergeExperts(info.index, info.name, kept=kept[info.index], **merged))
        else:
            edits.append(PruneExperts(info.index, info.name, kept=kept[info.index]))
    expected = form_of(point.config, edits)
    model = point.load()
    apply_plan(model, Plan(tuple(edits)))
    logits, folder = logits_of(model), home / edits_of
    form = save_checkpoint(model, folder, home / "dense")
    assert (form.stock, form.reason) == (expected.stock, expected.reason)
    return folder, logits, form.stock, kept


@CAUSAL
def test_pruned_and_merged_models_are_read_again(family: str, tmp_path: Path) -> None:
    folders = []
    for edits_of in ("uniform", "merge", "unequal"):
        folder, memory, stock, kept = edited(family, tmp_path, edits_of)
        assert stock == (edits_of != "unequal" and family != "jetmoe")
        again = load(folder)
        moe_layers(again)
        assert torch.equal(logits_of(again), memory)
        with collecting(again):  # also of our own form, which is built before it is whole
            torch.testing.assert_close(logits_of(again), memory, rtol=1e-4, atol=1e-4)
        assert (memory - logits_of(load(tmp_path / "dense"))).abs().max() > 0.1
        if edits_of != "merge":
            reference = masked_logits(load(tmp_path / "dense"), kept)
            torch.testing.assert_close(memory, reference, rtol=1e-3, atol=1e-3)
        folders.append((folder, memory, stock))
    replies = in_stock(*(folder for folder, *_ in folders))
    for (_, memory, stock), (said, logits) in zip(folders, replies, strict=True):
        assert said == ("clean, cached as not" if stock else "refused")
        if stock:
            assert logits is not None
            close(family, logits, memory)


@EACH
def test_experts_left_out_for_a_while_are_as_pruned_and_as_masked(family: str) -> None:
    model = odd_model(family)
    infos = [layer.info for layer in moe_layers(model)]
    plain, kept = logits_of(model), {info.index: KEPT for info in infos}
    with restricted(model, kept):
        left_out = logits_of(model)
    with ExitStack() as stack:
        for layer in moe_layers(model):
            stack.enter_context(masked_layer(layer, KEPT))
        masked = logits_of(model)
    assert torch.equal(logits_of(model), plain)
    for layer in moe_layers(model):
        prune_layer(layer, KEPT)
    assert (plain - left_out).abs().max() > 0.1
    torch.testing.assert_close(left_out, logits_of(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masked, left_out, rtol=1e-3, atol=1e-3)


@CAUSAL
def test_merged_experts_are_the_mean_of_matched_ones(family: str) -> None:
    """Of an expert and one with its hidden units in another order the mean is the expert."""
    layer = moe_layers(odd_model(family))[0]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    parts = expert_parameters(layer.experts)
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = expert_forward(layer.experts, parts[0], x_TD)
        into = torch.cat([order, order + 16])
        if family == "dbrx":
            for name in ("w1", "v1", "w2"):
                flat = layer.block.get_parameter(f"experts.mlp.{name}").view(8, 16, 32)
                flat[1] = flat[0][order]
        else:
            up, down = parts[1]["up"], parts[1]["down"]
            transposed = layer.experts.is_transposed
            up.copy_(parts[0]["up"][:, into] if transposed else parts[0]["up"][into])
            down.copy_(parts[0]["down"][order] if transposed else parts[0]["down"][:, order])
        edit = MergeExperts(
            layer.info.index, layer.info.name, kept=(0, 2, 3, 4, 5, 6, 7),
            groups=((0, 1), (2,), (3,), (4,), (5,), (6,), (7,)),
            weights=((0.5, 0.5), *((1.0,) for _ in range(6))), align="weights",
        )  # fmt: skip
        edit.apply(layer, {})
        parts = expert_parameters(layer.experts)
        assert len(parts) == 7
        got = expert_forward(layer.experts, parts[0], x_TD)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@CAUSAL
def test_layer_by_layer_is_as_the_whole(family: str, tmp_path: Path) -> None:
    odd_model(family).save_pretrained(tmp_path)
    point, batches = Checkpoint(tmp_path), [tiny_batch(seed) for seed in (0, 1)]
    whole = collect_statistics(point.load(), batches)
    compute = Compute(device="cpu", layerwise=True)
    single = collect_profile(
        point, [(0, batch) for batch in batches], False, compute, tmp_path
    ).of_group()
    assert [one.info.index for one in single] == [one.info.index for one in whole]
    for one, other in zip(single, whole, strict=True):
        assert one.sums.keys() == other.sums.keys()
        for name, value in one.sums.items():
            torch.testing.assert_close(value, other.sums[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash"])
def test_top_k_is_changed_for_a_while(family: str) -> None:
    model = odd_model(family)
    before = moe_layers(model)[0].info.top_k
    with at_top_k(model, 4):
        layer = moe_layers(model)[0]
        assert layer.info.top_k == 4
        assert layer.router(torch.randn(5, 32))[2].shape == (5, 4)
    assert moe_layers(model)[0].info.top_k == before
    assert scoring(moe_layers(model)[0]) == "softmax"


@pytest.mark.parametrize("model_type", ["nllb-moe", "switch_transformers", "doge"])
def test_what_cannot_be_compressed_is_refused_with_the_reason(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    reason = "PEER" if model_type == "doge" else "encoder-decoder"
    with pytest.raises(UserError, match=rf"family '{model_type}' cannot be .*{reason}"):
        meta_model(config)
    assert (model_type in REFUSED) == (model_type == "doge")


def test_too_few_experts_are_refused() -> None:
    with pytest.raises(UserError, match=r"1 of 8 .* chooses 2"):
        check_kept(moe_layers(odd_model("dbrx"))[0].info, 1)
