"""Measuring: parameter arithmetic in closed form, and an exact count of memory."""

from __future__ import annotations

import functools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import DENSE, EXPERTS, HIDDEN, LAYERS, SHARED, TOP_K, VOCABULARY, WIDTH, tiny
from families import tiny_model
from safetensors.torch import save_file
from stand_ins import replaced

from moe_lab.measure.speed import (
    _StorageCounter,
    active_parameters,
    bytes_on_disk,
    fit_together,
    flops_per_token,
    measure,
    peak_memory_bytes,
)
from moe_lab.models import routers as model_routers
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import num_parameters


def expected_parameters(experts: int, tied: bool) -> int:
    """The arithmetic of Qwen2-MoE, its first layer dense; four heads share two keys and values."""
    attention = HIDDEN * HIDDEN * 2 + HIDDEN + 2 * (HIDDEN * HIDDEN // 2 + HIDDEN // 2)
    norms = 2 * HIDDEN
    dense = 3 * HIDDEN * DENSE
    moe = experts * 3 * HIDDEN * WIDTH + EXPERTS * HIDDEN + 3 * HIDDEN * SHARED + HIDDEN
    embeddings = VOCABULARY * HIDDEN * (1 if tied else 2)
    return embeddings + HIDDEN + LAYERS * (attention + norms) + dense + (LAYERS - 1) * moe


def prompt(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.arange(batch * length).reshape(batch, length) % VOCABULARY


@pytest.mark.parametrize("tied", [False, True])
def test_parameters(tied: bool) -> None:
    model = tiny(tied=tied)
    assert num_parameters(model) == expected_parameters(EXPERTS, tied)
    assert active_parameters(model) == expected_parameters(TOP_K, tied)


def test_counter_follows_each_storage() -> None:
    weight = torch.ones(100)
    with _StorageCounter([weight, weight.view(10, 10)]) as counter:
        assert counter.now == 400
        doubled = weight * 2
        assert counter.now == 800
        doubled.add_(1)
        assert doubled.view(10, 10)[2:].shape == (8, 10)
        assert counter.now == 800
        (doubled + 1).sum().item()
        del doubled
        assert counter.now == 400
        assert counter.peak == 400 + 400 + 400 + 4
    assert counter.now == 400


def test_peak_memory_is_exact_and_grows_with_the_batch() -> None:
    model = tiny()
    weights = 4 * num_parameters(model)
    first, second = (peak_memory_bytes(model, prompt()) for _ in range(2))
    assert first == second
    larger = peak_memory_bytes(model, prompt(batch=4))
    longer = peak_memory_bytes(model, prompt(length=32))
    assert weights < first < larger
    assert first < longer
    # Activations, unlike weights, double with the batch (position tables and such stay).
    assert 1.8 < (larger - weights) / (first - weights) < 2.05


def test_peak_memory_holds_the_cache() -> None:
    model = tiny()
    cache = LAYERS * 2 * 2 * 16 * (HIDDEN // 2) * 4  # keys and values, batch 2, 16 tokens, fp32
    assert peak_memory_bytes(model, prompt()) > 4 * num_parameters(model) + cache


@pytest.mark.parametrize("together", [True, False])
def test_measure_gives_every_key(together: bool) -> None:
    """Also where one model at a time is held: then the one before is gone when the next comes."""
    models = {"dense": EXPERTS, "compressed": 4}
    held: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    def load(experts: int) -> Any:
        alive.append(sum(one() is not None for one in held))
        model = tiny(experts=experts)
        held.append(weakref.ref(model))
        return model

    figures = measure(
        {name: functools.partial(load, experts) for name, experts in models.items()},
        prompt_length=16,
        batch_size=2,
        decode_tokens=3,
        repeats=2,
        vocabulary_size=VOCABULARY,
        seed=0,
        together=together,
    )
    assert alive == ([0, 1] if together else [0, 0])
    names = {
        "parameters",
        "parameter_ratio",
        "active_parameters",
        "flops_per_token",
        "peak_memory_bytes",
        "memory_ratio",
        "prefill_seconds",
        "prefill_speedup",
        "decode_seconds_per_token",
        "decode_speedup",
    }
    assert set(figures) == {f"{variant}/{name}" for variant in models for name in names}
    assert all(value > 0 for value in figures.values())
    for name in ("memory_ratio", "prefill_speedup", "decode_speedup"):
        assert figures[f"dense/{name}"] == 1.0
    assert figures["compressed/memory_ratio"] < 1.0
    assert figures["compressed/parameters"] < figures["dense/parameters"]
    assert figures["dense/parameter_ratio"] == 1
    ratio = figures["compressed/parameters"] / figures["dense/parameters"]
    assert figures["compressed/parameter_ratio"] == ratio
    assert figures["compressed/peak_memory_bytes"] < figures["dense/peak_memory_bytes"]
    speedup = figures["dense/prefill_seconds"] / figures["compressed/prefill_seconds"]
    assert figures["compressed/prefill_speedup"] == pytest.approx(speedup)


def test_models_share_a_gpu_where_half_of_it_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 400))
    assert fit_together([20, 30], "cuda:0")
    assert not fit_together([20, 31], "cuda")
    assert fit_together([2000, 3100], "cpu")


def test_bytes_on_disk_counts_weights_alone(tmp_path: Path) -> None:
    names = {f"x{number}": f"model-{number}.safetensors" for number in range(2)}
    for key, name in names.items():
        save_file({key: torch.zeros(100)}, tmp_path / name)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    save_file({"x0": torch.zeros(100)}, tmp_path / "consolidated.safetensors")
    index = {"metadata": {"total_size": 800}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "tokenizer.json").write_text("{}" * 1000)
    assert bytes_on_disk(tmp_path) == sum(sizes) >= 800


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_the_model_shrinks_by_the_experts_that_go(family: str) -> None:
    model = tiny_model(family)
    parameters, active, flops = (
        count(model)
        for count in (num_parameters, active_parameters, lambda m: flops_per_token(m, 8))
    )
    expert = 3 * 32 * 16 + (2 * 16 + 32 if family == "gpt_oss" else 0)
    plan = replaced(model, "constant", "copy")
    apply_plan(model, plan)
    assert parameters - num_parameters(model) == (4 + 3) * expert - 4 * 32
    # The most that a token can use, as one that is sent to no stand-in.
    assert active_parameters(model) == active
    assert flops_per_token(model, 8) == flops + 2 * 4 * 32  # the four constants' own product


def test_flops_are_counted_product_by_product() -> None:
    """Mixtral by hand: per token projections, attention over all pairs, k experts, the head."""
    model, length = tiny_model("mixtral"), 10
    attention = 2 * 32 * (32 + 16 + 16 + 32) + 2 * 2 * length * 32
    layer = attention + 2 * 32 * 8
    for top_k in (1, 2):
        model_routers.set_top_k(model, top_k)
        experts = top_k * 3 * 2 * 32 * 16
        assert flops_per_token(model, length) == 4 * (layer + experts) + 2 * 32 * 96
