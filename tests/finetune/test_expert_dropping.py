"""Task-specific expert pruning: who is dropped, when, and what is left in the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dropping import NOTHING, recipe_of, rows, train_one, training
from families import tiny_batch, tiny_model
from running import run_killed, start_two
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_lab.finetune import training as finetune_training
from moe_lab.finetune.expert_dropping import survivors
from moe_lab.finetune.tuning import next_token_loss
from moe_lab.models.checkpoint import load
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import set_top_k
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


def curve(folder: Path) -> list[dict]:
    lines = (folder / "curve.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_the_threshold_by_hand() -> None:
    """Four alive of six: with beta 0.4 the border is 0.1, which itself is no reason to go."""
    alpha, alive = torch.tensor([0.5, 0.0, 0.1, 0.33, 0.0, 0.07]), [0, 2, 3, 5]
    assert survivors(alpha, alive, beta=0.4, fewest=1) == [0, 2, 3]
    assert survivors(alpha, alive, beta=1.6, fewest=1) == [0]
    assert survivors(alpha, alive, beta=1.6, fewest=2) == [0, 3]
    assert survivors(alpha, alive, beta=9.0, fewest=3) == [0, 2, 3]
    assert survivors(alpha, alive, beta=0.1, fewest=2) == alive
    assert survivors(torch.tensor([0.5, 0.5]), [0, 1], beta=float("inf"), fewest=1) == [0]


@pytest.mark.parametrize(
    ("options", "num_steps", "ends"),
    [
        (dict(windows=2, force="half"), 8, [1, 3]),
        (dict(windows=2, force="end"), 8, [3, 7]),
        (dict(windows=3, force=None), 8, [2, 5, 7]),
        (dict(windows=5, force="half"), 4, [0, 1]),
        (dict(windows=1, force="half"), 1, [0]),
    ],
)
def test_where_windows_end(options: dict, num_steps: int, ends: list[int]) -> None:
    recipe = recipe_of(**options)
    found = [step for step in range(num_steps) if recipe.ends_window(step, num_steps)]
    assert found == ends
    assert recipe.forced_after(num_steps) == ends[-1] + 1


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_alpha_is_the_routers_own_weight(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """Against a slow count, token by token; the backward pass's own forward is not heard."""
    model = tiny_model(family)
    trained = training(model, tmp_path, gradient_checkpointing=checkpointing)
    part = trained.tokens["lm/data"].take(range(6))
    wanted = {layer.info.index: [0.0] * 8 for layer in moe_layers(model)}
    for ids in part.samples:  # one by one: no padding at all
        outputs: dict[int, tuple] = {}
        handles = [
            layer.router.register_forward_hook(
                lambda _, a, output, to=outputs, index=layer.info.index: to.update({index: output})
            )
            for layer in moe_layers(model)
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        for index, (_, weights, chosen) in outputs.items():
            for token, experts in enumerate(chosen.tolist()):
                for rank, expert in enumerate(experts):
                    wanted[index][expert] += weights[token, rank].item()
    trained._validation("lm")  # enters no alpha
    trained._backward(part, 4)
    trained.tuning.after_step(0, 100)
    for index, alpha in trained.tuning.alpha().items():
        expected = torch.tensor(wanted[index], dtype=torch.float64)
        torch.testing.assert_close(alpha, expected / expected.sum(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            trained.tuning.window_NE[trained.tuning.row[index]], expected, rtol=1e-5, atol=1e-6
        )


def test_dropped_experts_get_no_token_afterwards(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    trained = training(model, tmp_path, force=None, beta=0.9, windows=4)
    tuning, seen = trained.tuning, []

    def hear(experts: torch.nn.Module, args: tuple, index: int) -> None:
        alive = set(tuning.alive[index])
        assert set(args[1].unique().tolist()) <= alive
        seen.append(len(alive))

    for index, layer in tuning.layers.items():
        layer.experts.register_forward_pre_hook(lambda m, a, index=index: hear(m, a, index))
    trained.run()
    alive = [row["experts_alive"] for row in curve(tmp_path)]
    ends = [row["step"] for row in curve(tmp_path) if "dropped" in row]
    assert min(seen) < 8 and ends == [2, 4, 6, 8]
    assert alive == sorted(alive, reverse=True) and alive[0] == 8 > alive[-1] >= 3
    gone = {index: set() for index in tuning.alive}
    for row in curve(tmp_path):
        for index, experts in row.get("dropped", {}).items():
            assert not gone[int(index)] & set(experts), "dropped once only"
            gone[int(index)] |= set(experts)
    for layer in moe_layers(model):
        kept = tuning.alive[layer.info.index]
        assert layer.info.num_experts == len(kept) >= layer.info.top_k == 3
        assert set(kept) | gone[layer.info.index] == set(range(8))


@pytest.mark.parametrize("force", ["half", "end"])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_one_expert_is_left_and_stock_transformers_loads_it(
    family: str, force: str, tmp_path: Path
) -> None:
    """The end equals the dense model, trained weights put in, pruned to those experts with k 1."""
    model, twin = tiny_model(family), tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    trained = training(model, tmp_path / "run", force=force)
    trained.tuning.finish, finish = lambda: None, trained.tuning.finish
    trained.run()
    alive = {"half": [8] + [None] * 2 + [1] * 5, "end": [8] * 3 + [None] * 4 + [1]}[force]
    for row, expected in zip(curve(tmp_path / "run"), alive, strict=True):
        assert expected in (None, row["experts_alive"])
    batch = tiny_batch()
    with torch.no_grad():
        twin.load_state_dict(model.state_dict())
        restricted = model(**batch).logits
        finish()
        for layer in moe_layers(twin):
            prune_layer(layer, trained.tuning.alive[layer.info.index])
        set_top_k(twin, 1)
        found = model(**batch).logits
        assert torch.allclose(found, twin(**batch).logits, atol=1e-5)
        assert torch.allclose(found, restricted, atol=1e-5)
        assert save_checkpoint(model, tmp_path / "out", tmp_path / "source").stock
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        again.set_experts_implementation(model.config._experts_implementation)
        assert torch.allclose(again(**batch).logits, found, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 1
    assert {layer.info.num_experts for layer in moe_layers(again)} == {1}


def test_it_goes_on_learning_after_the_forced_drop(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    kept = training(model, tmp_path, steps=24)
    kept.tokens["lm/data"] = dataclasses.replace(
        rows(4), samples=rows(4).samples * 24
    )  # the same four samples in every step, so that they can be learned
    kept.run()
    losses = [row["loss"] for row in curve(tmp_path)]
    assert losses[-1] < losses[12] < losses[0]


@pytest.mark.parametrize(("stop", "saved"), [(4, 3), (6, 5), (7, 6)])
def test_resumed_equals_uninterrupted(stop: int, saved: int, tmp_path: Path, monkeypatch) -> None:
    """To the bit; stopped in a window, behind a threshold's drop and behind the forced one.

    Windows end with steps 2, 4 and 6 of 12, the last forced.
    """
    options: dict[str, Any] = dict(steps=12, windows=3, beta=0.9)
    whole = tiny_model("qwen2_moe")
    training(whole, tmp_path / "whole", **options).run()
    first = training(tiny_model("qwen2_moe"), tmp_path / "stopped", **options)
    run_killed(first, stop, saved, monkeypatch)
    assert int(load_file(tmp_path / "stopped" / finetune_training.STATE)["done"]) == saved
    resumed = tiny_model("qwen2_moe")
    training(resumed, tmp_path / "stopped", **options).run()
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in resumed.state_dict().items())
    curves = [(tmp_path / name / "curve.jsonl").read_text() for name in ("whole", "stopped")]
    assert curves[0] == curves[1] and len(curve(tmp_path / "whole")) == 12


PROCESS = """
import sys
from pathlib import Path
import torch
import dropping
torch.set_num_threads(1)
dropping.train_one(Path(sys.argv[1]))
"""


def test_two_processes_drop_the_same(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    started = start_two(PROCESS, str(two))
    train_one(one)
    assert [process.wait(timeout=500) for process in started] == [0, 0]
    found = [[row.get("dropped") for row in curve(folder)] for folder in (one, two)]
    assert found[0] == found[1] and found[0][-1]


@pytest.mark.parametrize("trains", ["experts", "routers", "both", "all"])
def test_only_what_trains_moves(trains: str, tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe")
    before = {name: value.clone() for name, value in model.named_parameters()}
    trained = training(model, tmp_path, steps=2, force=None, beta=1e-6, trains=trains)
    trained.run()
    moved = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    routers = {name for name in before if name.endswith("mlp.gate.weight")}
    experts = {n for n in before if ".experts." in n or ".shared_expert." in n}
    allowed = {"routers": routers, "experts": experts, "both": routers | experts}
    assert moved and moved <= allowed.get(trains, set(before))
    assert trains != "all" or "model.embed_tokens.weight" in moved


def test_it_works_behind_pruning(tmp_path: Path) -> None:
    """Layers of different sizes, as ratio=global leaves them; and needs no plan at all."""
    model = tiny_model("qwen2_moe")
    for layer, number in zip(moe_layers(model), (8, 5, 3), strict=True):
        prune_layer(layer, range(number))
    trained = training(model, tmp_path)
    trained.run()
    assert {layer.info.num_experts for layer in moe_layers(model)} == {1}
    assert not recipe_of().needs_edits
    recipe_of().check(NOTHING)
    recipe_of().check(Plan((PruneExperts(1, "model.layers.1.mlp", kept=(0, 1, 2)),)))
    with pytest.raises(UserError, match="the plan leaves none"):
        recipe_of().check(Plan((DropLayer(1, "model.layers.1.mlp"),)))


def test_its_loss_is_the_plain_one(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    batch = rows(5).labelled()
    trained = training(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(trained.tuning.losses(batch)["loss"], next_token_loss(model, batch))


WRONG = {
    "windows": ({"windows": 0}, r"finetune\.windows=0: there must be at least 1"),
    "beta": ({"beta": 0.0}, r"finetune\.beta=0\.0: it must be above 0"),
    "force": ({"force": "third"}, r"finetune\.force=third: there are half, end and null"),
    "trains": ({"trains": "norms"}, r"finetune\.trains=norms: there are experts, routers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_recipes_are_refused(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        recipe_of(**changes)


@pytest.mark.parametrize("force", ["half", None])
def test_routers_that_cannot_are_refused_without_weights(force: str | None) -> None:
    def check(family: str) -> None:
        model = tiny_model(family)
        recipe_of(force=force).check_model(model.config, [la.info for la in moe_layers(model)])

    check("qwen2_moe")
    with pytest.raises(UserError, match=r"layer 1 works on 2 groups.*stay equally large"):
        check("deepseek_v3")
    if force is None:
        check("glm4_moe")  # one group, whose score is the sum of its two best experts
    else:
        with pytest.raises(UserError, match=r"'glm4_moe' cannot work with one.*force=null"):
            check("glm4_moe")


def test_a_job_of_nothing_but_dropping(job, tmp_path: Path) -> None:
    outcome = job(
        "method=none", "finetune=expert_dropping", "finetune.phases.lm.data.num_samples=32",
        "finetune.phases.lm.data.max_length=16", "finetune.phases.lm.validation=null",
        "finetune.windows=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.text
    folder = Path(outcome.report["finetuned/checkpoint"])
    assert outcome.report["finetuned/stock"]
    assert [row["experts_alive"] for row in curve(folder.parent)] == [1.0, 1.0]
    assert {layer.info.num_experts for layer in moe_layers(load(folder))} == {1}
