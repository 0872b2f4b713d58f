"""SEER-MoE's second stage: gate entropy, annealing of the number of experts, what is saved."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, run_killed
from families import FAMILIES, tiny_batch, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.suite import Suite
from moe_lab.evaluate.top_k import other_top_k, with_top_k
from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.gate_entropy import entropy
from moe_lab.finetune.recipe import Phase
from moe_lab.finetune.seer import Seer
from moe_lab.measure import flops_per_token
from moe_lab.models import routers as model_routers
from moe_lab.models.checkpoint import Checkpoint, load, meta_model
from moe_lab.models.editing import prune_layer
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import Plan, UserError

NOTHING = Plan(())


def recipe_of(**options: Any) -> Seer:
    return Seer(phases={"lm": Phase(None, batch_size=4, learning_rate=1e-2)}, **options)


def rows(number: int, seed: int = 0) -> Tokens:
    """Samples of 3 to 11 random tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (number,), generator=generator).tolist()
    samples = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]
    return Tokens(tuple(map(tuple, samples)), pad_id=0)


def training(model: PreTrainedModel, recipe: Seer, folder: Path, number: int = 24) -> Any:
    tokens = {"lm/data": rows(number), "lm/validation": rows(6, seed=1)}
    phase = dataclasses.replace(recipe.phases["lm"], validation="given")
    recipe = dataclasses.replace(recipe, phases={"lm": phase})
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_training.Training, "_write_trainable", lambda self: None)
        made = finetune_training.Training(
            model, NOTHING, recipe, tokens, 0, Compute("cpu", batch_size=3), folder
        )
    made._write_trainable = lambda: None
    return made


# --------------------------------------------------------------------------- routers


@pytest.mark.parametrize("family", FAMILIES)
def test_restricted_is_pruned_and_leaves_nothing_behind(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    intact = model(**batch).logits
    kept = {layer.info.index: (0, 2, 3, 4, 6, 7) for layer in moe_layers(model)}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    heard: list[int] = []
    first = moe_layers(model)[0].router
    handle = first.register_forward_hook(lambda *call: heard.append(int(call[2][2].max())))
    with model_routers.restricted(model, kept):
        found = model(**batch).logits
    handle.remove()
    assert heard == [7]  # once, and by the experts' own numbers
    assert torch.equal(model(**batch).logits, intact)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for layer in moe_layers(model):
        prune_layer(layer, kept[layer.info.index])
    assert torch.equal(model(**batch).logits, found)
    assert not torch.allclose(found, intact)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
def test_pruning_all_but_k_is_masking_the_router(family: str) -> None:
    """All other logits -inf before the family's own scoring; by hand, on each layer's block."""
    model = tiny_model(family)
    for layer in moe_layers(model):
        kept = list(range(1, 1 + layer.info.top_k))
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(layer.info.index))
        weight, bias = layer.router.weight.clone(), getattr(layer.router, "bias", None)
        logits = x @ weight.T + (0 if bias is None else bias)
        masked = torch.full_like(logits, -torch.inf)
        masked[:, kept] = logits[:, kept]
        scores = {"glm4_moe": torch.sigmoid}.get(family, lambda z: z.softmax(-1))(masked)
        if family in ("qwen3_moe", "mixtral", "glm4_moe"):
            scores = scores / scores.sum(-1, keepdim=True)
        factor = getattr(layer.block, "routed_scaling_factor", 1.0)
        factor = getattr(layer.router, "routed_scaling_factor", factor)
        prune_layer(layer, kept)
        _, weight_TK, index_TK = layer.router(x)
        expected = factor * scores[:, kept].gather(1, index_TK)
        torch.testing.assert_close(weight_TK, expected, rtol=1e-5, atol=1e-6)
        assert all(sorted(row) == list(range(layer.info.top_k)) for row in index_TK.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_of_experts_is_another_config(family: str, tmp_path: Path) -> None:
    """Set on a loaded model, saved, and read again by stock transformers, all three agree."""
    model, batch = tiny_model(family), tiny_batch()
    model.save_pretrained(tmp_path / "model")
    before = model(**batch).logits
    model_routers.set_top_k(model, 1)
    found = model(**batch).logits
    assert not torch.allclose(found, before)
    assert {layer.info.top_k for layer in moe_layers(model)} == {1}
    checkpoint = Checkpoint(tmp_path / "model", top_k=1)
    assert checkpoint.fingerprint != Checkpoint(tmp_path / "model").fingerprint
    assert torch.equal(checkpoint.load()(**batch).logits, found)
    model.save_pretrained(tmp_path / "one")
    assert AutoConfig.from_pretrained(tmp_path / "one").num_experts_per_tok == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(again(**batch).logits, found)


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
        other_top_k(Suite(top_k=[1]), None, config, layers)
    assert other_top_k(Suite(top_k=[2]), None, config, layers) == [2]


def test_no_more_experts_than_a_tokens_groups_have() -> None:
    model = tiny_model("deepseek_v3")  # 2 groups of 4 experts, a token may use 1 of them
    layers = [layer.info for layer in moe_layers(model)]
    with pytest.raises(UserError, match=r"eval.top_k=\[5\]: a token can get 1 to 4 experts"):
        other_top_k(Suite(top_k=[5]), None, model.config, layers)
    assert other_top_k(Suite(top_k=[4, 1]), None, model.config, layers) == [4, 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_scoring_is_known_whatever_k_is(family: str, top_k: int) -> None:
    model = tiny_model(family)
    model_routers.set_top_k(model, top_k)
    expected = "sigmoid" if family in ("deepseek_v3", "glm4_moe") else "softmax"
    assert {model_routers.scoring(layer) for layer in moe_layers(model)} == {expected}
    assert {layer.info.top_k for layer in moe_layers(model)} == {top_k}


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options,message",
    [
        ({"top_k": 0}, "finetune.top_k=0: a token needs at least 1"),
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
        (["finetune.top_k=0"], "a token needs at least 1 expert"),
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


def test_a_variant_without_moe_layers_has_no_other_k(job: Callable[..., Outcome]) -> None:
    few = ["eval.tasks=[]", "eval.held_out.num_samples=4", "eval.held_out.max_length=32"]
    asked = ["method=drop_layers", "condense.num_layers=3", "eval=perplexity", "eval.top_k=[1]"]
    outcome = job(*asked, *few)
    assert outcome.code == 0, outcome.text
    assert "dense_top_1/kl" in outcome.report and "compressed/kl" in outcome.report
    assert "compressed_top_1/kl" not in outcome.report


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


# --------------------------------------------------------------------------- annealing


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


# --------------------------------------------------------------------------- entropy


def slow_entropy(model: PreTrainedModel, batch: dict[str, torch.Tensor], family: str) -> float:
    """The mean over layers of the entropies summed over valid tokens, one token at a time."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.router.register_forward_hook(lambda m, a, out: seen.append(out[0].reshape(-1, 8)))
        for layer in moe_layers(model)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    total = 0.0
    for logits in seen:
        for z, valid in zip(logits.double(), batch["attention_mask"].reshape(-1), strict=True):
            if valid:
                p = z.softmax(0) if family != "glm4_moe" else z.sigmoid() / z.sigmoid().sum()
                total -= float((p * p.log()).sum())
    return total / len(seen)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "glm4_moe", "gpt_oss"])
def test_entropy_is_that_of_each_valid_token(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    tuning = recipe_of().prepare(model, NOTHING)
    found = tuning.losses(batch | {"labels": batch["input_ids"]})["entropy"].detach()
    assert found.item() == pytest.approx(slow_entropy(model, batch, family), rel=1e-5)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4), value=7),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 4)),
    }
    again = tuning.losses(padded | {"labels": padded["input_ids"]})["entropy"].detach()
    assert again.item() == pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize("scoring", model_routers.SCORINGS)
def test_the_gradient_of_entropy_is_its_finite_difference(scoring: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entropy(z, scoring), logits)
    uniform = torch.zeros(1, 5, dtype=torch.float64)
    assert entropy(uniform, scoring).item() == pytest.approx(torch.tensor(5.0).log().item())


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


def test_gradient_checkpointing_hears_each_router_once(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        recipe = recipe_of(gradient_checkpointing=checkpointing)
        trained = training(tiny_model("mixtral"), recipe, tmp_path / "out")
        means = trained._backward(trained.tokens["lm/data"].take(range(6)), 3)
        found.append((means, {name: p.grad for name, p in trained.trainable.items()}))
    (means, gradients), (other_means, others) = found
    assert means == other_means
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


# --------------------------------------------------------------------------- training


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


# --------------------------------------------------------------------------- saving

STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "moe_lab" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    print(json.dumps([model.config.num_experts_per_tok, model(ids).logits.double().tolist()]))
"""


@pytest.mark.parametrize("family,twins", [("mixtral", True), ("glm4_moe", True), ("olmoe", False)])
def test_twins_make_unequal_layers_native_where_they_change_nothing(
    family: str, twins: bool, tmp_path: Path
) -> None:
    """olmoe does not renormalise: a twin would take half of an expert's weight."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    model_routers.set_top_k(model, 1)
    for number, layer in enumerate(moe_layers(model)):
        prune_layer(layer, range(3 + number))
    ids = torch.arange(5, 40)[None]
    expected = model(ids).logits
    exact = sum(parameter.numel() for parameter in model.parameters())
    assert not save_checkpoint(model, tmp_path / "exact", tmp_path / "source", padding=0).stock
    assert torch.equal(load(tmp_path / "exact")(ids).logits, expected)
    form = save_checkpoint(
        load(tmp_path / "exact"), tmp_path / "filled", tmp_path / "source", twins=1
    )
    assert form.stock == twins
    if not twins:
        return
    assert Checkpoint(tmp_path / "filled").repeats_experts
    assert not Checkpoint(tmp_path / "exact").repeats_experts
    filled = load(tmp_path / "filled")
    numbers = {str(layer.info.index): 3 + i for i, layer in enumerate(moe_layers(filled))}
    assert filled.config.distinct_experts == numbers
    assert sum(p.numel() for p in filled.parameters()) == exact + form.repeated
    arguments = [str(tmp_path / "filled"), json.dumps(ids.tolist())]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    top_k, logits = json.loads(done.stdout)
    assert top_k == 1
    found = torch.tensor(logits, dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "limit,named", [(1, ["own", "own_top_1"]), (0, ["own", "own_top_1", "own_top_2"])]
)
def test_twins_are_no_second_expert(limit: float, named: list[str], tmp_path: Path) -> None:
    """With two experts per token both places would go to one expert and its twin."""
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    model_routers.set_top_k(model, 1)
    for number, layer in enumerate(moe_layers(model)):
        prune_layer(layer, range(3 + number))
    form = save_checkpoint(model, tmp_path / "checkpoint", tmp_path / "source", twins=limit)
    (tmp_path / "form.json").write_text(json.dumps(form.to_json()))
    found = with_top_k({"own": Checkpoint(tmp_path / "checkpoint")}, [1, 2], Suite(top_k=[1, 2]))
    assert list(found) == named


def test_two_experts_for_each_token_take_no_twins(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    for number, layer in enumerate(moe_layers(model)):
        prune_layer(layer, range(3 + number))
    assert not save_checkpoint(model, tmp_path / "out", tmp_path / "source", twins=1).stock


def test_flops_are_counted_product_by_product() -> None:
    """Mixtral by hand: per token projections, attention over all pairs, k experts, the head."""
    model, length = tiny_model("mixtral"), 10
    attention = 2 * 32 * (32 + 16 + 16 + 32) + 2 * 2 * length * 32
    layer = attention + 2 * 32 * 8
    for top_k in (1, 2):
        model_routers.set_top_k(model, top_k)
        experts = top_k * 3 * 2 * 32 * 16
        assert flops_per_token(model, length) == 4 * (layer + experts) + 2 * 32 * 96


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
