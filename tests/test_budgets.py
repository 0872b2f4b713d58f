"""Budgets: sizes in experts, parameters, bytes and GiB, and numbers that a search finds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from families import tiny_batch, tiny_model
from safetensors import safe_open

from moe_lab.methods.ratios import budget as ratios_budget
from moe_lab.methods.ratios.all_layers import Global
from moe_lab.methods.ratios.budget import GIB, Budget
from moe_lab.methods.ratios.evolutionary import Evolutionary, first_generation, shared_out
from moe_lab.methods.ratios.listed import Listed
from moe_lab.methods.ratios.sensitivity import Sensitivity, least_sum
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models import checkpoint as model_checkpoint
from moe_lab.models import saving
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.editing import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.profile.intact_predictions import IntactPredictions
from moe_lab.profile.profile import Profile
from moe_lab.types import Edit, LayerInfo, Plan, UserError

QUICK = {"num_samples": 2, "population": 4, "generations": 3, "parents": 2}


def layer(index: int, num_experts: int = 8, **more: int) -> LayerInfo:
    """A layer of a model of 10,000 bytes (half as many parameters) with 100 bytes an expert."""
    values = {"top_k": 2, "hidden_size": 2, "expert_parameters": 50, "expert_bytes": 100}
    values |= {"model_parameters": 5_000, "model_bytes": 10_000}
    return LayerInfo(index, f"model.layers.{index}.mlp", num_experts, **(values | more))


def scored(layers: list[LayerInfo], seed: int = 0) -> list[tuple[LayerInfo, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(info, torch.rand(info.num_experts, generator=generator)) for info in layers]


def numbers(ratio: Any, layers: list[LayerInfo]) -> list[int]:
    ratio.check(layers)
    return list(ratio.numbers(scored(layers), Profile([])).values())


def saved_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors, by the tensors themselves, and of its files."""
    tensors = 0
    for file in model_checkpoint.weight_files(folder):
        with safe_open(file, "pt") as handle:
            for name in list(handle.keys()):
                tensor = handle.get_tensor(name)
                tensors += tensor.numel() * tensor.element_size()
    return tensors, model_checkpoint.size_in_bytes(folder)


# --------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")
def test_sizes_are_those_of_the_model_that_is_saved(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tied = {"tie_word_embeddings": family == "qwen2_moe"}
    model = tiny_model(family, **tied)
    first, source = tmp_path / "first", tmp_path / "model"
    saving.save_checkpoint(model, first, _stored(model, tmp_path, dtype))
    saving.save_checkpoint(Checkpoint(first).load(), source, first)
    headers = saved_bytes(source)[1] - saved_bytes(source)[0]
    for computing in ("auto", "float32"):
        dense = Checkpoint(source, computing)
        infos, loaded = dense.layers(), dense.load()
        saving.save_checkpoint(loaded, tmp_path / f"again_{computing}", source)
        intact = saved_bytes(tmp_path / f"again_{computing}")[0]
        assert infos[0].model_bytes == intact + headers
        loaded = dense.load()
        parameters = {id(p): p.numel() for p in loaded.parameters()}
        assert infos[0].model_parameters == sum(parameters.values())
        kept = {info.index: 8 - 2 * (place + 1) if family != "deepseek_v3" else 4
                for place, info in enumerate(infos[:2])}  # fmt: skip
        gone = [(info, 8 - kept[info.index]) for info in infos[:2]]
        edits = (Edit(info.index, info.name, "prune", kept=tuple(range(8))[: kept[info.index]])
                 for info in infos[:2])  # fmt: skip
        apply_plan(loaded, Plan(tuple(edits)))
        after = {id(p): p.numel() for p in loaded.parameters()}
        removed = sum(number * info.expert_parameters for info, number in gone)
        assert sum(after.values()) == infos[0].model_parameters - removed
        saving.save_checkpoint(loaded, tmp_path / computing, source)
        removed = sum(number * info.expert_bytes for info, number in gone)
        assert saved_bytes(tmp_path / computing)[0] == intact - removed
        assert saved_bytes(tmp_path / computing)[1] <= infos[0].model_bytes - removed


def _stored(model: Any, folder: Path, dtype: torch.dtype) -> Path:
    """A folder whose config says this dtype."""
    (folder / "config").mkdir()
    model.config.dtype = dtype
    model.config.save_pretrained(folder / "config")
    return folder / "config"


def test_shares_may_be_of_parameters_or_bytes() -> None:
    layers = [layer(1), layer(2)]  # 16 experts of 100 bytes in a model of 10,000
    assert numbers(Uniform(0.08, of="bytes"), layers) == [4, 4]
    assert numbers(Uniform(0.08, of="parameters"), layers) == [4, 4]
    assert numbers(Uniform(0.08), layers) == [7, 7]
    assert sum(numbers(Global(0.05, of="bytes"), layers)) == 11
    with pytest.raises(UserError, match=r"ratio.of=bytes is too much.*At most 0\.12 "):
        Uniform(0.13, of="bytes").check(layers)
    with pytest.raises(UserError, match=r"ratio.of='gib' .*experts, parameters, bytes"):
        Uniform(0.13, of="gib").check(layers)
    unequal = [layer(1), layer(2, expert_bytes=200)]
    with pytest.raises(UserError, match=r"\[100, 200\] bytes.*ratio.of=experts"):
        Global(0.05, of="bytes").check(unequal)
    Global(0.05).check(unequal)


@pytest.mark.parametrize("make", [Uniform, Global, Evolutionary, Sensitivity])
def test_a_target_is_met_from_below(make: type[Budget]) -> None:
    layers = [layer(1), layer(2), layer(3)]
    for size in range(8_200, 10_300, 37):
        budget = make(0.9, target_gib=size / GIB)
        budget.check(layers)
        if make is Uniform:
            kept, step = sum(budget.numbers(scored(layers), Profile([])).values()), 3
        else:
            kept, step = budget.total(layers), 1
        assert 10_000 - 100 * (24 - kept) <= size or kept == 24
        assert kept == 24 or 10_000 - 100 * (24 - kept - step) > size
    least = 10_000 - 18 * 100
    message = r"target_gib=.* is too little.*The model has 9\.314e-06 GiB now.* as 7\.637e-06 GiB"
    with pytest.raises(UserError, match=message):
        make(0.5, target_gib=(least - 1) / GIB).check(layers)
    make(0.5, target_gib=least / GIB).check(layers)
    with pytest.raises(UserError, match=r"is too little: (layer 1: )?0 of"):
        make(0.5, target_gib=1 / GIB).check(layers)
    with pytest.raises(UserError, match="must be above 0"):
        make(0.5, target_gib=0.0).check(layers)


def test_what_a_target_replaces_is_no_part_of_the_identity() -> None:
    options = {"ratio": 0.25, "of": "experts", "target_gib": None, "round_to": 1}
    assert Uniform(0.25).identity(options) == options
    found = Uniform(0.25, target_gib=1.0).identity(options | {"target_gib": 1.0})
    assert found == {"target_gib": 1.0, "round_to": 1}


# --------------------------------------------------------------------------- round_to


def test_every_layer_keeps_a_multiple() -> None:
    layers = [layer(index, 30) for index in range(4)]
    assert numbers(Uniform(0.25, round_to=8), layers) == [24] * 4  # 22.5: nearer than 16
    assert numbers(Uniform(0.4, round_to=8), layers) == [16] * 4  # 18
    assert numbers(Uniform(0.0, round_to=8), layers) == [24] * 4
    assert numbers(Uniform(0.9, round_to=8), layers) == [8] * 4  # 3 would stay: 0 is no floor
    assert (
        numbers(Uniform(0.5, target_gib=(10_000 - 4 * 800) / GIB, round_to=8), layers) == [16] * 4
    )
    with pytest.raises(UserError, match=r"0\.99 is too much.* 0 of 30"):
        Uniform(0.99, round_to=8).check(layers)
    for ratio in (0.25, 0.5):
        found = numbers(Global(ratio, round_to=4), layers)
        assert all(number % 4 == 0 for number in found)
        assert abs(sum(found) - 120 * (1 - ratio)) <= 2
    grouped = [layer(index, 16, groups=2, groups_used=1, top_k=3) for index in range(3)]
    assert set(numbers(Uniform(0.4, round_to=3), grouped)) == {12}  # 9.6: of 6 and 12
    assert all(number % 6 == 0 for number in numbers(Global(0.4, round_to=3), grouped))
    with pytest.raises(UserError, match=r"round_to=16: layer 1 keeps at least 2 of 8 .*of 16"):
        Global(0.25, round_to=16).check([layer(1)])
    with pytest.raises(UserError, match=r"round_to=0: .*at least 1"):
        Uniform(0.25, round_to=0).check([layer(1)])
    with pytest.raises(UserError, match=r"4 of 8 .*fewer than ratio.floor=5.*At most 0\.375"):
        Uniform(0.5, floor=5).check([layer(1)])


# --------------------------------------------------------------------------- listed


def test_listed_numbers_are_taken_as_they_are(tmp_path: Path) -> None:
    layers = [layer(1), layer(2), layer(5)]
    assert numbers(Listed([4, 8, 2]), layers) == [4, 8, 2]
    assert numbers(Listed({5: 3}), layers) == [8, 8, 3]
    edits = (Edit(1, "a", "prune", kept=(0, 5)), Edit(2, "b", "keep"),
             Edit(5, "c", "merge", kept=(1, 2, 3)))  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(Plan(edits).to_text())
    from_plan = Listed(plan=str(path))
    assert numbers(from_plan, layers) == [2, 8, 3]
    options = {"_target_": "x", "kept": None, "plan": str(path)}
    assert from_plan.identity(options) == Listed({5: 3, 1: 2}).identity(options)
    path.write_text(Plan((Edit(1, "a", "drop_layer"),)).to_text())
    for wrong, words in (
        (Listed(), r"ratio.kept=\[6,4,8\].*\{3:4\}.*ratio.plan"),
        (Listed([4, 4]), r"ratio.kept=\[4,4\]: 2 numbers for 3 .*\[1, 2, 5\].*\{1:4\}"),
        (Listed({3: 4}), r"ratio.kept=\{3:4\}: 3 is no MoE layer; they are \[1, 2, 5\]"),
        (Listed([4, 9, 8]), r"layer 2 has 8 experts and can keep 2 to 8 of them, not 9"),
        (Listed({2: "x"}), r"not 'x'"),
        (Listed([1, 8, 8]), r"layer 1: 1 of 8.*chooses 2.*can keep 2 to 8"),
        (Listed(plan=str(tmp_path / "no.json")), r"no.json cannot be read as a plan"),
        (Listed(plan=str(path)), r"layer 1 ends as 'drop_layer'"),
    ):
        with pytest.raises(UserError, match=words):
            wrong.check(layers)


# --------------------------------------------------------------------------- agreement


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return [tiny_batch(seed=1), tiny_batch(seed=2, padding=False)]


def pruned_logits(family: str, kept: dict[int, tuple[int, ...]], batch: dict) -> torch.Tensor:
    """Of a model that is really pruned, in double precision at the valid positions."""
    model = tiny_model(family)
    names = {one.info.index: one.info.name for one in moe_layers(model)}
    apply_plan(
        model, Plan(tuple(Edit(i, names[i], "prune", kept=some) for i, some in kept.items()))
    )
    with torch.no_grad():
        logits = model(**batch).logits.double()
    return logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_agreement_is_that_with_the_pruned_model(family: str, batches: list) -> None:
    model = tiny_model(family)
    sample = IntactPredictions(model, batches)
    kept = {1: (0, 1, 4, 6), 3: (1, 3, 5, 7)}
    overlap, divergence, count = 0.0, 0.0, 0
    for batch in batches:
        rows = zip(
            pruned_logits(family, {}, batch), pruned_logits(family, kept, batch), strict=True
        )
        for intact, changed in rows:
            p, q = intact.softmax(0), changed.softmax(0)
            overlap += sum(min(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            divergence += float((p * (p / q).log()).sum())
            count += 1
    assert count == sample.num_positions == sum(int(b["attention_mask"].sum()) for b in batches)
    assert sample.acceptance(kept) == pytest.approx(overlap / count, rel=1e-5)
    assert sample.divergence(kept) == pytest.approx(divergence / count, rel=1e-4)
    assert sample.acceptance({}) == pytest.approx(1.0, abs=1e-6)
    assert sample.divergence({1: tuple(range(8))}) == pytest.approx(0.0, abs=1e-6)


# --------------------------------------------------------------------------- evolutionary


def test_evolution_keeps_the_total_and_finds_the_best() -> None:
    rooms, total, wanted = (6, 6, 3, 6), 10, (1, 5, 3, 1)
    seen = []

    def fitness(vector: tuple[int, ...]) -> float:
        seen.append(vector)
        return -sum((a - b) ** 2 for a, b in zip(vector, wanted, strict=True))

    search = Evolutionary(0.25, seed=3)
    best, path, forwards = search.evolve(rooms, total, fitness)
    assert best == wanted and path == sorted(path) and path[-1] == 0 and len(path) == 50
    assert forwards == len(seen) == len(set(seen))  # nothing is looked at twice
    assert all(sum(vector) == total for vector in seen)
    assert all(0 <= n <= room for vector in seen for n, room in zip(vector, rooms, strict=True))
    first = list(seen)
    seen.clear()
    search.evolve(rooms, total, fitness)
    assert seen == first
    seen.clear()
    Evolutionary(0.25, seed=4).evolve(rooms, total, fitness)
    assert seen != first


def test_the_first_generation_is_the_papers() -> None:
    import random

    found = first_generation([8] * 4, 8, 14, random.Random(0))
    assert found[0] == (2, 2, 2, 2)
    assert found[2] == (1, 2, 2, 3)  # 0.8 1.6 2.4 3.2: the rest goes to .8 and .6
    assert found[3] == (3, 2, 2, 1)
    assert found[8] == (3, 2, 2, 1)  # 3.2 1.6 1.6 1.6: two of the three .6
    assert len(found) == 14 and all(sum(vector) == 8 for vector in found)
    assert shared_out([100.0, 1.0, 1.0], [3, 8, 8], 7) == (3, 2, 2)
    assert shared_out([1.0, 1.0], [0, 5], 4) == (0, 4)


@pytest.fixture(scope="module")
def profile(batches: list) -> Profile:
    model = tiny_model("qwen2_moe")

    def open_model(num_samples: int) -> tuple[Any, list]:
        return model, batches[:num_samples]

    return Profile([], open_model=open_model)


def test_evolved_numbers_agree_best(profile: Profile, batches: list) -> None:
    infos = [one.info for one in moe_layers(tiny_model("qwen2_moe"))]
    scores = scored(infos)
    search = Evolutionary(0.25, **(QUICK | {"population": 14, "generations": 6}))
    search.check(infos)
    found = search.numbers(scores, profile)
    assert sum(found.values()) == 18 and min(found.values()) >= 3
    assert found == search.numbers(scores, profile)
    notes = search.notes(scores, found)
    sample = IntactPredictions(tiny_model("qwen2_moe"), batches)
    assert notes["acceptance"][-1] == max(notes["acceptance"])
    assert sample.acceptance(ratios_budget.kept(scores, found)) == pytest.approx(
        notes["acceptance"][-1]
    )
    uniform = Uniform(0.25).numbers(scores, profile)
    assert sample.acceptance(ratios_budget.kept(scores, uniform)) <= notes["acceptance"][-1] + 1e-9
    assert notes["forwards"] <= 14 + 5 * 12
    for wrong, words in (
        ({"parents": 4}, r"ratio.parents=4: fewer than ratio.population=4"),
        ({"generations": 0}, r"ratio.generations=0: .*at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            Evolutionary(0.25, **(QUICK | wrong)).check(infos)


# --------------------------------------------------------------------------- sensitivity


def test_the_least_sum_is_the_least_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        curves = [generator.random(size) for size in generator.integers(1, 6, size=4)]
        rooms = [len(curve) - 1 for curve in curves]
        for total in range(sum(rooms) + 1):
            every = [places for places in itertools.product(*(range(r + 1) for r in rooms))
                     if sum(places) == total]  # fmt: skip
            sums = [sum(c[p] for c, p in zip(curves, places, strict=True)) for places in every]
            found = least_sum(curves, total)
            assert sum(found) == total
            assert tuple(found) == every[int(np.argmin(sums))]


def test_what_is_as_good_is_shared_evenly() -> None:
    for curve in (np.zeros(7), np.arange(7.0), np.arange(7.0) ** 2, np.arange(7.0) * 0.1):
        assert least_sum([curve] * 4, 12) == [3] * 4
        assert sorted(least_sum([curve] * 4, 13)) == [3, 3, 3, 4]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_curves_are_those_of_pruned_models(family: str, batches: list) -> None:
    infos = [one.info for one in moe_layers(tiny_model(family))]
    scores = scored(infos)
    ratio = Sensitivity(0.4, num_samples=2, step=1)
    ratio.check(infos)
    profile = Profile([], open_model=lambda count: (tiny_model(family), batches[:count]))
    found = ratio.numbers(scores, profile)
    errors = ratio.notes(scores, found)["errors"]
    step = infos[0].groups
    for info, score in scores:
        curve = errors[str(info.index)]
        possible = range(8, ratios_budget.floor_of(info, None) - 1, -step)
        assert list(curve) == [str(number) for number in possible]
        assert curve["8"] == 0.0
        number = possible[-1]
        kept = {info.index: ratios_budget.best(info, score, number)}
        total = sum(
            float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())
            for b in batches
            for p, q in [(pruned_logits(family, {}, b), pruned_logits(family, kept, b))]
        )
        count = sum(int(b["attention_mask"].sum()) for b in batches)
        assert curve[str(number)] == pytest.approx(total / count, rel=1e-4)
    assert sum(found.values()) == ratio.total(infos)
    predicted = sum(errors[str(index)][str(number)] for index, number in found.items())
    every = itertools.product(*(errors[str(info.index)].items() for info in infos))
    total = sum(found.values())
    sums = [sum(e for _, e in one) for one in every if sum(int(n) for n, _ in one) == total]
    assert predicted == pytest.approx(min(sums)) and len(sums) > 1
    assert found.found["predicted_error"] == pytest.approx(predicted)


def test_between_measured_numbers_lie_lines(profile: Profile) -> None:
    infos = [one.info for one in moe_layers(tiny_model("qwen2_moe"))]
    scores = scored(infos)
    whole = Sensitivity(0.25, num_samples=1, step=1).numbers(scores, profile).found
    some = Sensitivity(0.25, num_samples=1, step=3).numbers(scores, profile).found
    for index in some["errors"]:
        assert list(some["errors"][index]) == ["8", "5", "3"]
        assert some["errors"][index].items() <= whole["errors"][index].items()
    rounded = Sensitivity(0.25, num_samples=1, round_to=4).numbers(scores, profile)
    assert sorted(rounded.values()) == [4, 8, 8] or sorted(rounded.values()) == [4, 4, 8]
    for wrong, words in (({"error": "mse"}, "there are kl and output"), ({"step": 0}, "step=0")):
        with pytest.raises(UserError, match=words):
            Sensitivity(0.25, **wrong).check(infos)


# --------------------------------------------------------------------------- whole jobs


def test_a_job_within_a_memory_target(job: Callable[..., Outcome], checkpoint: Path) -> None:
    infos = Checkpoint(checkpoint, "float32").layers()
    target = infos[0].model_bytes - 5 * infos[0].expert_bytes  # 2 of each of 3 layers have to go
    done = job("metric=frequency", f"ratio.target_gib={target / GIB}")
    assert done.code == 0, done.text
    plan = Plan.load(next(done.store.glob("plan/*/plan.json")))
    assert [len(edit.kept) for edit in plan.edits] == [6, 6, 6]
    assert done.report["ratio"] is None and done.report["ratio/target_gib"] == target / GIB
    (folder,) = (path.parent for path in done.store.glob("compress/**/config.json"))
    tensors, files = saved_bytes(folder)
    assert files <= target < files + 3 * infos[0].expert_bytes
    assert tensors == saved_bytes(checkpoint)[0] - 6 * infos[0].expert_bytes
    refused = job("metric=frequency", "ratio=global", "ratio.target_gib=1e-6")
    assert refused.code == 2 and "can have as little as" in refused.text
    assert list(refused.store.glob("plan/*/plan.json")) == list(done.store.glob("plan/*/plan.json"))


@pytest.mark.parametrize("error", ["kl", "output"])
def test_a_job_that_measures_its_layers(job: Callable[..., Outcome], error: str) -> None:
    asked = ["metric=reap", "ratio=sensitivity", "ratio.num_samples=2", f"ratio.error={error}"]
    done = job(*asked)
    assert done.code == 0, done.text
    notes = json.loads(next(done.store.glob("plan/*/plan.json")).read_text())
    assert sum(len(edit["kept"]) for edit in notes["layers"]) == 18
    assert set(notes["errors"]) == {"1", "2", "3"} and notes["predicted_error"] > 0
    assert len(list(done.store.glob("search/*/answer.json"))) == 3
    again = job(*asked, "ratio.ratio=0.5")  # the same curves, another total
    assert again.code == 0, again.text
    assert len(list(done.store.glob("search/*/answer.json"))) == 3
    assert len(list(done.store.glob("plan/*/plan.json"))) == 2


def test_a_job_that_evolves_and_one_that_repeats_its_numbers(
    job: Callable[..., Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked = [f"ratio.{name}={value}" for name, value in QUICK.items()]
    done = job("metric=frequency", "ratio=evolutionary", *asked)
    assert done.code == 0, done.text
    assert "at most 8 forwards over 2 samples" in done.text
    path = next(done.store.glob("plan/*/plan.json"))
    first = json.loads(path.read_text())
    assert len(first["acceptance"]) == 3
    again = job("metric=frequency", "ratio=listed", f"ratio.plan={path}")
    assert again.code == 0, again.text
    (other,) = set(done.store.glob("plan/*/plan.json")) - {path}
    assert json.loads(other.read_text())["layers"] == first["layers"]
    listed = "{1:4,3:6}"
    done = job("metric=frequency", "ratio=listed", f"ratio.kept={listed}")
    assert done.code == 0, done.text
    (third,) = set(done.store.glob("plan/*/plan.json")) - {path, other}
    assert [len(edit.kept) for edit in Plan.load(third).edits] == [4, 8, 6]
