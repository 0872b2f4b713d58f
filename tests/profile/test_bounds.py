"""What a profile takes at most, from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from counting import batches
from families import tiny_model

from moe_lab.models.layerwise import sizes_of
from moe_lab.profile.bounds import ProfileRequest, WeightBytes, bounds, sums_of
from moe_lab.profile.collect import collect_by_group
from moe_lab.types import LayerInfo

KIMI = LayerInfo(
    1, "model.layers.1.mlp", num_experts=384, top_k=8, hidden_size=7168, shared=True,
    shared_width=2048, expert_width=2048, num_decoders=61,
)  # fmt: skip
GIB = 2**30


@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_sums_take_what_is_said(family: str, neurons: bool) -> None:
    model = tiny_model(family)
    found = collect_by_group(model, [(0, batch) for batch in batches(5)], neurons=neurons)
    for layer in found.of_group():
        size = sum(value.nbytes for value in layer.sums.values())
        assert 0.8 * sums_of(layer.info, neurons) < size <= sums_of(layer.info, neurons)


def test_sizes_of_a_model_are_those_of_its_parts() -> None:
    model = tiny_model("qwen2_moe")
    sizes = sizes_of(model)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert sizes.layer == max(layers)
    assert sizes.outside == sum(p.numel() for p in model.parameters()) - sum(layers)
    assert (sizes.widest, sizes.eager_heads) == (48, 0), "the dense layer's MLP"
    assert sizes_of(tiny_model("gpt_oss")).eager_heads == 4


def test_kimi_k2_of_100_documents_of_16k_tokens() -> None:
    weights = WeightBytes(int(31.9 * GIB), int(4.4 * GIB), itemsize=2, widest=18432)
    layers = [replace(KIMI, index=index) for index in range(1, 61)]
    asked = ProfileRequest([(1, 16384)] * 100, neurons=True, cache=4 * GIB)
    found = bounds(layers, weights, asked)
    assert found.states == 4 * GIB, "of 21.9, the rest lies on disk"
    assert 10 * GIB < found.forward < 13 * GIB, "one document, eight experts for each token"
    assert found.layer == pytest.approx(2.7 * 31.9 * GIB), "the next one is read meanwhile"
    assert found.result == sum(sums_of(layer, True) for layer in layers) < 6 * GIB
    assert found.sums < GIB, "those of one layer, not of sixty"
    assert found.scratch > found.result + (21.8 - 4) * GIB
    converted = bounds(layers, replace(weights, converted=True), asked)
    assert converted.layer == pytest.approx(3.3 * 31.9 * GIB), "bfloat16 is read, float32 is made"
    alone = bounds(layers, weights, replace(asked, ahead=False))
    assert alone.memory == found.memory - int(31.9 * GIB)
    packed = bounds(layers, weights, replace(asked, batches=[(32, 16384)] * 4))
    assert packed.forward > 30 * found.forward, "what compute.batch_tokens keeps off"
    assert "GiB of memory at most" in found.in_words()


def test_groups_have_sums_of_their_own() -> None:
    asked = ProfileRequest([(1, 64)])
    weights = WeightBytes(2**20, 2**20, 2, 1024)
    one, three = (bounds([KIMI], weights, replace(asked, groups=number)) for number in (1, 3))
    assert three.result == 4 * one.result, "each, and all together"
    assert three.sums > one.sums


def test_attention_as_a_matrix_counts() -> None:
    plain = WeightBytes(2**20, 2**20, 2, 1024)
    asked = ProfileRequest([(1, 16384)])
    flash, eager = (
        bounds([KIMI], weights, asked).forward
        for weights in (plain, replace(plain, eager_heads=64))
    )
    assert eager - flash > 64 * 16384**2 * 2
