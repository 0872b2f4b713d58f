"""Trainings of every recipe, whose decoder layers several processes may divide among them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from annealing import recipe_of as seer
from dropping import recipe_of as dropping
from families import tiny_batch, tiny_model
from trainings import PLANS, recipe_of

from moe_lab import processes
from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.finetune.recipe import Recipe
from moe_lab.finetune.training import Training
from moe_lab.models.checkpoint import Model
from moe_lab.models.edits.plan import Plan, apply_plan, read_edit
from moe_lab.models.layers import moe_layers

# Twelve samples, five a step: both processes have unequal shares, and at the end one has none.
RECIPES: dict[str, Recipe] = {
    "gates": recipe_of(gates=True, batch_size=2, gradient_accumulation=2),
    "recomputed": recipe_of(gradient_checkpointing=True, batch_size=5),
    "seer": seer(trains="all", entropy=0.1),
    "dropping": dropping(force=None, beta=0.9),
}


def samples(seed: int, count: int) -> Tokens:
    """Samples of 4 to 10 random tokens."""
    ids = tiny_batch(seed=seed, batch=count, padding=False)["input_ids"].tolist()
    return Tokens(tuple(tuple(row[: 4 + i % 7]) for i, row in enumerate(ids)), pad_id=0)


TEXTS = {"lm/data": samples(1, 11), "lm/validation": samples(2, 5)}


def model_and_plan(name: str) -> tuple[Model, Plan]:
    """A tiny model, condensed where the recipe trains what that leaves."""
    if name == "dropping":
        return tiny_model("mixtral"), Plan(())
    model = tiny_model("qwen2_moe")
    if name == "seer":
        return model, Plan(())
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    edits = (read_edit({"name": names[edit["index"]]} | edit) for edit in PLANS["condense"])
    plan = Plan(tuple(edits))
    apply_plan(model, plan)
    return model, plan


def training(name: str, sharding: str, folder: Path) -> Training:
    """A training by one of RECIPES, from a model that is the same in every process."""
    model, plan = model_and_plan(name)
    text = {key: getattr(recipe_of().phases["lm"], key) for key in ("data", "validation")}
    # Slow: routers choose others where Adam has made much of the rounding of small gradients.
    text |= {"learning_rate": 3e-4}
    phase = dataclasses.replace(RECIPES[name].phases["lm"], **text)
    recipe = dataclasses.replace(RECIPES[name], phases={"lm": phase}, validate_every=2)
    compute = Compute("cpu", batch_size=2, sharding=sharding)
    return Training(model, plan, recipe, TEXTS, 0, compute, folder)


def train_all(home: Path, shardings: tuple[str, ...]) -> None:
    """Every recipe with each sharding: its curve, and with fsdp its state, in a folder of its own.

    What a divided training left is finished by the main process alone, as the stage does it.
    """
    for sharding in shardings:
        for name in RECIPES:
            folder = home / sharding / name
            folder.mkdir(parents=True, exist_ok=True)
            done = training(name, sharding, folder)
            done.run()
            if done.divided:
                held, whole = _sizes(done)
                assert held < 0.6 * whole, "a process has its part alone"
                processes.wait()


def _sizes(done: Training) -> tuple[int, int]:
    """The numbers that this process holds of decoder layers, and how many they are in all."""
    divided = [one for one in done.model.parameters() if hasattr(one, "to_local")]
    return sum(one.to_local().numel() for one in divided), sum(one.numel() for one in divided)
