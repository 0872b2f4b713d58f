"""Finetune: a recipe at work on a checkpoint, resumed where it was stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT, FORM, PLAN
from moe_lab.finetune.recipe import Phase, Recipe, sources
from moe_lab.finetune.teacher import Teacher
from moe_lab.finetune.training import STATE, Training
from moe_lab.finetune.tuning import Tuning
from moe_lab.models import editing, forms, layers, observing, own_form, remapped, routers, saving
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.saving import save_checkpoint
from moe_lab.store import Artifact, Store
from moe_lab.types import Plan


def finetune(
    store: Store,
    compressed: Checkpoint,
    plan: Artifact,
    recipe: Recipe,
    options: dict[str, Any],
    tokens: dict[str, Tokens],
    seed: int,
    compute: Compute,
    taught: Artifact | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Artifact:
    """A folder with checkpoint/, form.json, curve.jsonl and trainable.json.

    options: the recipe's composed config; tokens: by the names that
    `sources` gives, others are not used; taught: what `teach` made, where the recipe distils; log:
    takes each row of the curve while it trains.
    """
    edits = Plan.load(plan.folder / PLAN)
    recipe.check(edits)
    tokens = {name: tokens[name] for name in sources(recipe.phases)}
    code = [finetune, Training, Phase, Tuning, recipe, editing, layers, observing, routers]
    code += [saving, forms, own_form, remapped]
    identity = {
        "checkpoint": compressed.fingerprint,
        "plan": plan.key,
        "recipe": recipe.identity(options),
        "data": {name: part.fingerprint for name, part in tokens.items()},
        "seed": seed,
        "code": code_version(*code),
    }
    if taught:
        identity["teacher"] = taught.key

    def make(folder: Path) -> None:
        # Weights that do not train stay as they are stored, unless all is computed in float32.
        dtype = "float32" if recipe.dtype == "float32" else "auto"
        model = dataclasses.replace(compressed, dtype=dtype).load(compute.device)
        teacher = Teacher(taught.folder, tokens.values()) if taught else None
        Training(model, edits, recipe, tokens, seed, compute, folder, teacher, log).run()
        place = folder / CHECKPOINT
        form = save_checkpoint(model.cpu(), place, compressed.path, twins=recipe.twins)
        (folder / FORM).write_text(json.dumps(form.to_json()) + "\n")
        (folder / STATE).unlink(missing_ok=True)

    return store.get("finetune", identity, make)
