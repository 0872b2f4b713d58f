"""SEER-MoE's second stage: annealing of the number of experts, and what trains."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from annealing import NOTHING, recipe_of, training
from families import FAMILIES, tiny_batch, tiny_model
from running import Outcome, run_killed
from transformers import AutoConfig

from moe_lab.evaluate.top_k import other_top_k
from moe_lab.models import routers as model_routers
from moe_lab.models.checkpoint import meta_model
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError


def test_routers_that_do_not_obey_are_refused() -> None:
    config = AutoConfig.for_model(
        "phimoe", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=16, num_local_experts=8,
    )  # fmt: skip
    layers = [layer.info for layer in moe_layers(meta_model(config))]
    with pytest.raises(UserError, match="'phimoe' choose 2 experts for each token whatever"):
        recipe_of(top_k=1).check_model(config, layers)
    recipe_of(top_k=2).check_model(config, layers)
    recipe_of(top_k=None).check_model(config, layers)
    with pytest.raises(UserError, match="'phimoe' choose 2 experts for each token whatever"):
        other_top_k([1], None, config, layers)
    assert other_top_k([2], None, config, layers) == [2]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": 0}, "finetune.top_k=0: it must be at least 1"),
        ({"entropy": -0.1}, "finetune.entropy=-0.1: it must be at least 0"),
        ({"annealing": "cosine"}, "there are linear, staircase, at_once"),
        ({"annealed_at": 1.5}, "finetune.annealed_at=1.5"),
        ({"trains": "attention"}, "there are experts, routers, both, all"),
        ({"twins": -1.0}, "finetune.twins=-1.0"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_of(**options)


def test_bad_input_is_refused_before_any_work(job: Callable[..., Outcome]) -> None:
    for options, message in (
        (["finetune.top_k=4"], "finetune.top_k=4: the model gives a token 3 experts"),
        (["finetune.top_k=0"], "finetune.top_k=0: it must be at least 1, or null"),
        (["finetune.entropy=-1"], "must be at least 0"),
        (["eval=tiny", "eval.top_k=[9]"], r"a token can get 1 to 8 experts"),
    ):
        outcome = job("method=none", "finetune=seer", *options)
        assert outcome.code == 2 and message in outcome.text, outcome.text
        assert outcome.stages() == []


def test_layers_that_are_not_edited_are_trained(job: Callable[..., Outcome]) -> None:
    """A plan is foreseen from the edited layers alone; those that stay are no less there."""
    few = ["finetune.phases.lm.data.num_samples=8", "finetune.phases.lm.validation=null"]
    for recipe in ("seer", "expert_dropping"):
        outcome = job("method=drop_layers", "condense.layers=last", f"finetune={recipe}", *few)
        assert outcome.code == 0, outcome.text
    outcome = job("method=drop_layers", "condense.num_layers=3", "finetune=seer", *few)
    assert outcome.code == 2 and "the plan leaves none" in outcome.text, outcome.text


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_alone_learn_nothing_where_their_weight_is_one(family: str) -> None:
    """The gradient of the task's loss at k = 1 says which families these are."""
    model, batch = tiny_model(family), tiny_batch()
    config = model.config
    model_routers.set_top_k(model, 1)
    recipe = recipe_of(trains="routers", annealing="at_once", entropy=0.0)
    tuning = recipe.prepare(model, NOTHING)
    for parameter in tuning.trainable.values():
        parameter.requires_grad_(True)
    tuning.losses(batch | {"labels": batch["input_ids"]})["loss"].backward()
    largest = max(float(p.grad.abs().max()) for p in tuning.trainable.values())
    learns = largest > 1e-4
    assert learns == (family not in ("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss"))
    config.num_experts_per_tok = 2
    layers = [layer.info for layer in moe_layers(meta_model(config))]
    if learns:
        recipe.check_model(config, layers)
        return
    with pytest.raises(UserError, match="router weights are always 1"):
        recipe.check_model(config, layers)
    for other in ({"entropy": 0.1}, {"annealing": "linear"}, {"trains": "both"}):
        dataclasses.replace(recipe, **other).check_model(config, layers)


@pytest.mark.parametrize("annealing", ["linear", "staircase"])
@pytest.mark.parametrize("first,last", [(2, 1), (4, 1), (8, 2), (2, 2)])
def test_annealing_reaches_k_at_the_step_asked(annealing: str, first: int, last: int) -> None:
    recipe = recipe_of(top_k=last, annealing=annealing, annealed_at=0.75)
    steps = [recipe.k_at(step, 200, first) for step in range(200)]
    assert steps[0] == first and set(steps[150:]) == {last}
    assert set(steps) == set(range(last, first + 1))
    if annealing == "staircase":
        assert steps == sorted(steps, reverse=True)
        counts = [steps[:150].count(k) for k in range(last, first + 1)]
        assert max(counts) - min(counts) <= 1
    elif first > last:
        straight = [first + (last - first) * step / 150 for step in range(150)]
        for number in range(150):  # the running sums never part by a whole expert
            assert abs(sum(steps[: number + 1]) - sum(straight[: number + 1])) < 1 + 1e-9
        assert steps[149] in (last, last + 1)


def test_k_without_annealing() -> None:
    assert {recipe_of(annealing="at_once").k_at(s, 50, 4) for s in range(50)} == {1}
    assert {recipe_of(top_k=None).k_at(s, 50, 4) for s in range(50)} == {4}
    assert {recipe_of(top_k=3).k_at(s, 50, 2) for s in range(50)} == {2}


def test_the_curve_tells_which_experts_were_used(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    trained = training(model, recipe_of(annealing="staircase", annealed_at=1.0), tmp_path / "out")
    trained.run()
    found = [json.loads(row) for row in (tmp_path / "out" / "curve.jsonl").read_text().splitlines()]
    steps = [row for row in found if "top_k" in row]
    assert [row["top_k"] for row in steps] == [2, 2, 2, 1, 1, 1]
    assert [row["used_expert_1"] for row in steps] == [1.0] * 6
    tokens = [row["tokens"] for row in steps]
    assert steps[-1]["used_expert_2"] == pytest.approx(tokens[2] / tokens[5])
    assert {"validation_loss", "validation_entropy"} <= found[-1].keys()
    assert model.config.num_experts_per_tok == 1 and not model.training
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe"])
def test_the_loss_has_the_gradient_of_task_and_entropy(family: str, tmp_path: Path) -> None:
    """Central differences of L = loss per target + 0.5 * entropy per valid token.

    In float64, but for the router's softmax, which the family computes in float32.
    """
    model = tiny_model(family).double()
    trained = training(model, recipe_of(entropy=0.5, top_k=None), tmp_path / "out")
    model.set_experts_implementation("eager")
    part = trained.tokens["lm/data"].take(range(5))

    def total() -> float:
        batch = part.labelled()
        with torch.no_grad():
            sums = trained.tuning.losses(batch)
        return (sums["loss"] / part.num_targets + 0.5 * sums["entropy"] / part.num_tokens).item()

    for parameter in trained.trainable.values():
        parameter.data = parameter.data.double()
    means = trained._backward(part, 2)  # in three forwards
    assert total() == pytest.approx((means["loss"] + 0.5 * means["entropy"]).item(), rel=1e-6)
    for name, parameter in trained.trainable.items():
        if "gate.weight" not in name:
            continue
        place = int(parameter.grad.abs().argmax())
        values = parameter.data.view(-1)
        kept, step = values[place].item(), 1e-3
        values[place] = kept + step
        above = total()
        values[place] = kept - step
        below = total()
        values[place] = kept
        expected = (above - below) / (2 * step)
        assert parameter.grad.view(-1)[place].item() == pytest.approx(expected, rel=1e-2), name


def test_without_entropy_the_loss_is_the_plain_one(tmp_path: Path) -> None:
    """Lambda 0: the same gradients as if nothing looked at the routers; it is told all the same."""
    found = []
    for weight in (0.0, None):
        trained = training(
            tiny_model("mixtral"), recipe_of(entropy=weight or 0.0), tmp_path / "out"
        )
        if weight is None:
            trained.tuning.losses = super(type(trained.tuning), trained.tuning).losses
            trained.tuning.weights = {}
        means = trained._backward(trained.tokens["lm/data"].take(range(6)), 3)
        found.append((means, {name: p.grad for name, p in trained.trainable.items()}))
    (with_zero, gradients), (plain, others) = found
    assert with_zero["entropy"] > 0 and torch.equal(with_zero["loss"], plain["loss"])
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("trains", ["experts", "routers", "both", "all"])
def test_only_what_was_asked_trains(trains: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training(model, recipe_of(trains=trains), tmp_path / "out").run()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    routers = {f"model.layers.{index}.mlp.gate.weight" for index in (1, 2, 3)}
    experts = {
        f"model.layers.{index}.mlp.{name}"
        for index in (1, 2, 3)
        for name in ("experts.gate_up_proj", "experts.down_proj", "shared_expert.gate_proj.weight",
                     "shared_expert.up_proj.weight", "shared_expert.down_proj.weight")
    }  # fmt: skip
    expected = {"experts": experts, "routers": routers, "both": experts | routers}
    assert changed == expected.get(trains, set(before))


def test_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the annealing, with its counts of tokens: the same to the bit."""
    recipe = recipe_of(annealing="linear", annealed_at=0.9)
    whole = tiny_model("mixtral")
    training(whole, recipe, tmp_path / "whole").run()
    first = training(tiny_model("mixtral"), recipe, tmp_path / "parts")
    run_killed(first, stop=3, save_every=2, monkeypatch=monkeypatch)
    again = tiny_model("mixtral")
    second = training(again, recipe, tmp_path / "parts")
    second.run()
    assert second.done == 6
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items()
    )
    curves = [(tmp_path / name / "curve.jsonl").read_text() for name in ("whole", "parts")]
    assert curves[0] == curves[1]


def test_a_job_ends_with_one_expert_for_each_token(job: Callable[..., Outcome]) -> None:
    outcome = job(
        "method=prune", "metric=soft_count", "ratio=global", "ratio.ratio=0.25", "finetune=seer",
        "finetune.top_k=1", "finetune.phases.lm.data.num_samples=16", "measure=speed",
        "finetune.phases.lm.validation=null", "finetune.phases.lm.batch_size=4",
        "measure.prompt_length=16", "measure.repeats=1", "measure.decode_tokens=2",
        "eval=perplexity", "eval.held_out.num_samples=4",
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    report = outcome.report
    assert report["dense/eval/routing/top_k"] == 3 and report["finetune/top_k"] == 1
    assert report["dense_top_1/eval/routing/top_k"] == 1
    assert report["compressed_top_1/eval/routing/top_k"] == 1
    assert report["finetuned/eval/routing/top_k"] == 1 and "finetuned_top_1/kl" not in report
    assert report["dense_top_1/kl"] > 0 and report["dense/kl"] == 0
    assert report["finetune/used_expert_1"] == 1 and 0 <= report["finetune/used_expert_3"] < 1
    assert report["dense_top_1/flops_per_token"] < report["dense/flops_per_token"]
    config = json.loads((Path(report["finetuned/checkpoint"]) / "config.json").read_text())
    assert config["num_experts_per_tok"] == 1
    assert "entropy" in outcome.text and "top-1" in outcome.text
