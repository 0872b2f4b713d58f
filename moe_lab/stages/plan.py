"""Plan: what happens to each layer, decided and written down before any weight is touched."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import PLAN, PLANS
from moe_lab.finetune.recipe import Recipe
from moe_lab.methods.base import Method
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint, Model, check_plan
from moe_lab.models.forms import form_of
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile import collect
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Answer, Profile
from moe_lab.store import Artifact, Store, write_whole
from moe_lab.types import Edit, LayerInfo, Plan

logger = logging.getLogger(__name__)
ANSWER = "answer.json"


def plan(
    store: Store,
    checkpoint: Checkpoint,
    profile: Artifact,
    tokens: Tokens,
    method: Method,
    options: dict[str, Any],
    compute: Compute,
) -> Artifact:
    """A folder with plan.json. options: the method's composed config, its identity.

    Where the profile has groups, plans/<number>.json has a plan for each, and plan.json changes
    nothing but names the groups by number.
    What a search finds on the way is kept too, step by step (kind `search`): searches go on where
    they were stopped, and plans that ask the same questions share the answers.
    """
    code = code_version(method, *method.parts())

    def make(folder: Path) -> None:
        common = collect.load_statistics(profile.folder)
        groups = collect.load_groups(profile.folder)
        for number, layers in enumerate(groups.values()):
            (folder / PLANS).mkdir(exist_ok=True)
            write(planned(layers), folder / PLANS / f"{number}.json")
        made = _keep_all(common, list(groups)) if groups else planned(common)
        write(made, folder / PLAN)

    def write(made: Plan, path: Path) -> None:
        made.write_tensors(path)
        write_whole(path, made.to_text())

    @functools.cache
    def stored() -> dict[int, LayerInfo]:
        return {info.index: info for info in checkpoint.layers()}

    def planned(layers: list[LayerStatistics]) -> Plan:
        for layer in layers:  # profiled as the model computes; sizes count as it is saved
            layer.info = stored()[layer.info.index]
        made = method.plan(Profile(layers, open_stream, open_model, remember))
        check_plan([layer.info for layer in layers], made.edited())
        return made

    def batches(num_samples: int | None) -> list[dict[str, Tensor]]:
        sample = tokens.take(range(min(num_samples or len(tokens.samples), len(tokens.samples))))
        return sample.batches(compute.batch_size, compute.device)

    def open_model(num_samples: int | None = None) -> tuple[Model, list[dict[str, Tensor]]]:
        return checkpoint.load(compute.device), batches(num_samples)

    def open_stream(num_samples: int | None = None) -> LayerStream:
        limit = int(compute.cache_gib * 2**30)
        cache = Activations(limit, folder=store.root, device=compute.device)
        model = LayerwiseModel(checkpoint, compute.device, keep_bytes=limit)
        return LayerStream(model, batches(num_samples), cache)

    def remember(
        identity: dict[str, Any], work: Callable[[], Answer], code: Sequence[object]
    ) -> Answer:
        def answer(folder: Path) -> None:
            write_whole(folder / ANSWER, json.dumps(work()) + "\n")

        question = identity | {"profile": profile.key, "code": code_version(*code)}
        kept = store.get("search", question, answer)
        known: Answer = json.loads((kept.folder / ANSWER).read_text())
        return known

    identity = {
        "profile": profile.key,
        "method": method.identity(options),
        "code": code,
    }
    return store.get("plan", identity, make)


def _keep_all(layers: list[LayerStatistics], groups: list[str]) -> Plan:
    edits = tuple(Edit(layer.info.index, layer.info.name, "keep") for layer in layers)
    return Plan(edits, notes={"groups": groups})


def check_recipe(
    checkpoint: Checkpoint, method: Method, recipe: Recipe | None, layers: list[LayerInfo]
) -> None:
    """Refuse a recipe that cannot work with the model, or that the plan leaves nothing to train.

    Known before any work from the shape of the plan's edits, where the method tells it.
    """
    if not recipe:
        return
    recipe.check_model(checkpoint.config, layers)
    if edits := method.example(layers):
        indices = {edit.index for edit in edits}
        others = (info for info in layers if info.index not in indices)
        kept = tuple(Edit(info.index, info.name, "keep") for info in others)
        recipe.check(Plan((*edits, *kept)))


def announce_form(checkpoint: Checkpoint, method: Method, layers: list[LayerInfo]) -> None:
    """Say beforehand where the result will not load in stock transformers, or only with padding."""
    if checkpoint.repeats_experts:
        logger.warning(
            "%s has layers filled up with copies of their experts, which statistics, pruning and "
            "more than one expert per token take for experts of their own; made with "
            "finetune.twins=0 it has none", checkpoint.path,
        )  # fmt: skip
    if edits := method.example(layers):
        form = form_of(checkpoint.config, edits, method.padding)
        if not form.plain:
            logger.info("the result will be saved %s", form.reason)
