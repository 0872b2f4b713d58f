"""Means weighted by Fisher information, against the gradients of whole documents."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import tiny_batch, tiny_model
from torch.nn import functional as F

from moe_lab.models.factorized import stacked
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.fisher import fisher_means
from moe_lab.profile.profile import Profile

BATCHES = [tiny_batch(seed=0), tiny_batch(seed=1)]


def profile_of(model) -> Profile:
    statistics = [SimpleNamespace(info=layer.info) for layer in moe_layers(model)]
    return Profile(statistics, lambda number=None: LayerStream(model, BATCHES))


def by_hand(model) -> dict[int, dict[str, torch.Tensor]]:
    """sum_e F_e f_e W_e / sum_e F_e f_e by autograd through the model, a document at a time."""
    layers = moe_layers(model)
    squares = [{name: torch.zeros_like(one) for name, one in stacked(layer.experts).items()}
               for layer in layers]  # fmt: skip
    counts = [torch.zeros(layer.info.num_experts) for layer in layers]
    model.requires_grad_(True)
    chosen: list[torch.Tensor] = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
        for layer in layers
    ]
    for batch in BATCHES:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()][None]
            chosen.clear()
            model.zero_grad()
            logits = model(input_ids=ids).logits[0, :-1]
            F.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
            for place, layer in enumerate(layers):
                counts[place] += torch.bincount(chosen[place].flatten(), minlength=8)
                gradients = SimpleNamespace(
                    gate_up_proj=layer.experts.gate_up_proj.grad,
                    down_proj=layer.experts.down_proj.grad, is_transposed=False,
                )  # fmt: skip
                for name, one in stacked(gradients).items():
                    squares[place][name] += one.square()
    model.requires_grad_(False)
    for handle in handles:
        handle.remove()
    found = {}
    for layer, square, count in zip(layers, squares, counts, strict=True):
        found[layer.info.index] = {}
        for name, weight in stacked(layer.experts).items():
            share = square[name] * count[:, None, None]
            found[layer.info.index][name] = (share * weight).sum(dim=0) / share.sum(dim=0)
    return found


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_the_means_are_those_of_autograd(family: str) -> None:
    model = tiny_model(family)
    found, expected = fisher_means(profile_of(model), None), by_hand(model)
    assert found.keys() == expected.keys()
    for index, means in expected.items():
        for name, mean_ON in means.items():
            assert found[index][name].dtype == torch.float64
            torch.testing.assert_close(found[index][name].float(), mean_ON, rtol=2e-3, atol=2e-3)


def test_where_no_expert_is_heeded_the_mean_is_by_frequency() -> None:
    model = tiny_model("mixtral")
    model.lm_head.weight.data.zero_()  # the loss is the same whatever the experts do
    found = fisher_means(profile_of(model), None)
    layer = moe_layers(model)[0]
    chosen = []
    handle = layer.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    count = torch.zeros(8)
    for batch in BATCHES:
        model(**batch)
        valid = chosen.pop()[batch["attention_mask"].bool().flatten()]
        count += torch.bincount(valid.flatten(), minlength=8)
    handle.remove()
    mean = torch.einsum("e,eon->on", count / count.sum(), layer.experts.down_proj)
    torch.testing.assert_close(found[0]["down"].float(), mean)
