"""What a GPU computes is what the processor computes: skipped where there is none (`make gpu`)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_batch, tiny_model
from trainings import PLANS, samples, steps_of
from trainings import recipe_of as tiny_recipe

from moe_lab.compute import Compute
from moe_lab.evaluate.dense_predictions import DensePredictions
from moe_lab.evaluate.held_out import compare_held_out
from moe_lab.finetune.training import Training
from moe_lab.finetune.tuning import next_token_loss
from moe_lab.measure.speed import measure
from moe_lab.models import grouped
from moe_lab.models.activations import Activations
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.layers import moe_layers
from moe_lab.profile.collect import collect_batch, collect_statistics, collecting

DEVICE = "cuda"
FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def moved(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def plan_for(model: Any, kind: str) -> Plan:
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    return Plan(tuple(read_edit({"name": names[edit["index"]]} | edit) for edit in PLANS[kind]))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_is_the_processors(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation(implementation)
    batches = [tiny_batch(0), tiny_batch(1)]
    there = copy.deepcopy(model).to(DEVICE)
    on_gpu = collect_statistics(there, [moved(batch) for batch in batches], neurons=True)
    for one, other in zip(on_gpu, collect_statistics(model, batches, neurons=True), strict=True):
        assert one.sums.keys() == other.sums.keys()
        for name, value in other.sums.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_a_profile_waits_for_the_gpu_as_often_as_a_plain_forward() -> None:
    """And once a batch more, for which tokens are data."""
    model = tiny_model("mixtral").to(DEVICE, torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    batch = moved(tiny_batch())

    def waits(work: Callable[[], object]) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in told)

    with torch.inference_mode():
        model(**batch, use_cache=False, logits_to_keep=1)
        plain = waits(lambda: model(**batch, use_cache=False, logits_to_keep=1))
    with collecting(model) as collection:
        collect_batch(collection, model, batch)
        assert waits(lambda: collect_batch(collection, model, batch)) <= plain + 1


@pytest.mark.parametrize("kind", list(PLANS))
def test_what_is_compressed_there_is_the_processors(kind: str) -> None:
    model = tiny_model("qwen2_moe")
    there = copy.deepcopy(model).to(DEVICE)
    for one in (model, there):
        apply_plan(one, plan_for(one, kind))
    found = there.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-6, atol=1e-7, msg=name)


def test_held_out_figures_are_the_processors() -> None:
    dense, batches = tiny_model("qwen2_moe"), [tiny_batch(0), tiny_batch(1)]
    pruned = copy.deepcopy(dense)
    apply_plan(pruned, plan_for(pruned, "prune"))
    said = DensePredictions(dense, batches, Activations(2**30))
    expected = compare_held_out(pruned, batches, said)
    batches, kept = [moved(batch) for batch in batches], Activations(2**30, device=DEVICE)
    said = DensePredictions(copy.deepcopy(dense).to(DEVICE), batches, kept)
    found = compare_held_out(copy.deepcopy(pruned).to(DEVICE), batches, said)
    assert found.routed == expected.routed
    for name, value in expected.figures.items():
        assert found.figures[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("kind", list(PLANS))
def test_steps_of_fine_tuning_are_the_processors(kind: str, tmp_path: Path) -> None:
    curves = {}
    for device in ("cpu", DEVICE):
        model = tiny_model("qwen2_moe")
        plan = plan_for(model, kind)
        apply_plan(model, plan)
        (tmp_path / device).mkdir()
        texts = {"lm/data": samples(1, 12), "lm/validation": samples(2, 6)}
        given = tiny_recipe(), texts, 0, Compute(device), tmp_path / device
        Training(model, plan, *given).run()
        curves[device] = steps_of(tmp_path / device)
    for one, other in zip(curves[DEVICE], curves["cpu"], strict=True):
        for name in ("loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_all_experts_in_one_call_are_those_of_each(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and back in bfloat16, in which `finetune=cd_moe` computes."""
    plain, found = grouped.in_one_call, []
    batch = moved(tiny_batch())
    for way in (plain, lambda *_: False):
        calls: list[bool] = []
        watched = lambda *given, way=way, calls=calls: calls.append(way(*given)) or calls[-1]  # noqa: E731
        monkeypatch.setattr(grouped, "in_one_call", watched)
        model = tiny_model(family).to(DEVICE)
        model.set_experts_implementation(grouped.GROUPED_EXPERTS)
        with torch.autocast(DEVICE, torch.bfloat16):
            next_token_loss(model, batch | {"labels": batch["input_ids"]}).backward()
        assert set(calls) == {way is plain}
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[0][name], gradient, rtol=0.05, atol=0.02 * scale, msg=name)


@pytest.mark.parametrize("together", [True, False])
def test_models_are_measured_there(together: bool) -> None:
    """Each alone, so that the peak is its own."""
    kinds = {"dense": None, "pruned": "prune"}

    def load(kind: str | None) -> Any:
        model = tiny_model("qwen2_moe")
        if kind:
            apply_plan(model, plan_for(model, kind))
        return model.to(DEVICE)

    figures = measure(
        {name: (lambda kind=kind: load(kind)) for name, kind in kinds.items()},
        prompt_length=16, batch_size=2, decode_tokens=3, repeats=2, vocabulary_size=96, seed=0,
        together=together,
    )  # fmt: skip
    assert all(value > 0 for value in figures.values())
    assert figures["pruned/peak_memory_bytes"] < figures["dense/peak_memory_bytes"]
