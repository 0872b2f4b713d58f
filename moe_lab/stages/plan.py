"""Plan: what happens to each layer, decided and written down before any weight is touched."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_lab import (
    condense,
    divergence,
    expert_search,
    layer_choice,
    layer_search,
    layerwise,
    moe,
    statistics,
    stream,
)
from moe_lab.checkpoint import Checkpoint, check_plan
from moe_lab.compute import Compute
from moe_lab.layerwise import LayerwiseModel
from moe_lab.methods import Evidence
from moe_lab.saving import form_of
from moe_lab.store import Artifact, Store, code_version, write_whole
from moe_lab.stream import Activations, LayerStream
from moe_lab.tokens import Tokens
from moe_lab.types import LayerInfo, Plan

logger = logging.getLogger(__name__)
ANSWER = "answer.json"


def plan(
    store: Store,
    checkpoint: Checkpoint,
    profile: Artifact,
    tokens: Tokens,
    method: Any,
    options: dict[str, Any],
    compute: Compute,
) -> Artifact:
    """A folder with plan.json. options: the method's composed config, its identity.

    What a search finds on the way is kept too, step by step (kind `search`): searches go on where
    they were stopped, and plans that ask the same questions share the answers.
    """
    code = code_version(*_code(method))

    def make(folder: Path) -> None:
        evidence = Evidence(statistics.load(profile.folder), open_stream, remember)
        made = method.plan(evidence)
        check_plan([layer.info for layer in evidence.statistics], made.edited())
        write_whole(folder / "plan.json", made.to_text())

    def open_stream() -> LayerStream:
        limit = int(compute.cache_gib * 2**30)
        cache = Activations(limit, folder=store.root, device=compute.device)
        model = LayerwiseModel(checkpoint, compute.device, keep_bytes=limit)
        return LayerStream(model, tokens.batches(compute.batch_size, compute.device), cache)

    def remember(identity: dict[str, Any], work: Callable[[], Any]) -> Any:
        def answer(folder: Path) -> None:
            write_whole(folder / ANSWER, json.dumps(work()) + "\n")

        question = identity | {"profile": profile.key, "code": code_version(*_searches(method))}
        return json.loads((store.get("search", question, answer).folder / ANSWER).read_text())

    irrelevant = method.irrelevant() if hasattr(method, "irrelevant") else ()
    identity = {
        "profile": profile.key,
        "method": {name: value for name, value in options.items() if name not in irrelevant},
        "code": code,
    }
    return store.get("plan", identity, make)


def foresee(checkpoint: Checkpoint, method: Any, recipe: Any, layers: list[LayerInfo]) -> None:
    """What can be known of a plan before any work, from the shape of its edits.

    Refuses a recipe that such a plan leaves nothing to train, and says where the result will not
    load in stock transformers, or only with padding.
    """
    if not hasattr(method, "example"):
        return
    edits = method.example(layers)
    if recipe:
        recipe.check(Plan(edits))
    form = form_of(checkpoint.config, edits, getattr(method, "padding", None))
    if not form.plain:
        logger.info("the result will be saved %s", form.reason)


def _code(method: Any) -> list[Any]:
    """The modules that decide this plan: the method's own and those of its plug-ins."""
    if hasattr(method, "gates"):
        return [*_searches(method), *_plug_ins(method, "layers")]
    parts = [value for value in vars(method).values() if callable(value) or hasattr(value, "keep")]
    return [method, *parts, *([layer_choice] if hasattr(method, "layers") else [])]


def _searches(method: Any) -> list[Any]:
    """The modules that decide the answers to the questions of method=condense.

    Not the way in which layers are chosen by them: different ways share their answers.
    """
    searches = [condense, divergence, expert_search, layer_search, layerwise, moe, stream]
    return [method, *searches, *_plug_ins(method, "experts", "gates")]


def _plug_ins(method: Any, *kinds: str) -> list[Any]:
    """What condense.<kind> names, where it is no explicit list."""
    names = {kind: getattr(method, kind) for kind in kinds}
    return [condense.option(kind, name) for kind, name in names.items() if isinstance(name, str)]
