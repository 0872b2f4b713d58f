"""Teach: the intact model's next-token distributions over the text of a recipe that distils."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.finetune import teacher
from moe_lab.finetune.recipe import Distilling, sources
from moe_lab.models import activations, layers, layerwise, remapped, stream
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.store import Artifact, Store, check_writable
from moe_lab.types import UserError


def check_teacher(
    store: Store, dense: Checkpoint, recipe: Distilling, tokens: dict[str, Tokens]
) -> None:
    """Refuse a teacher for which the disk has no room, with a UserError."""
    if store.find("teacher", _identity(dense, recipe, tokens)) is None:
        vocabulary = dense.config.get_text_config().vocab_size
        texts = _texts(recipe, tokens)
        size = teacher.teacher_bytes(texts, vocabulary, recipe.teacher_top_k)
        try:
            check_writable(store.root, size)
        except UserError as error:
            kept = recipe.teacher_top_k or vocabulary
            raise UserError(
                f"finetune.teacher_top_k={recipe.teacher_top_k} keeps {kept:,} probabilities for "
                f"each token of the tuning text: {error}; or ask for fewer probabilities, or text"
            ) from error


def teach(
    store: Store,
    dense: Checkpoint,
    recipe: Distilling,
    tokens: dict[str, Tokens],
    compute: Compute,
) -> Artifact:
    """A folder that `teacher.Teacher` reads: shared by all jobs that tune on the same text.

    tokens: by the names that `sources` gives, validation among them; others are not used.
    """

    def make(folder: Path) -> None:
        texts, top_k = _texts(recipe, tokens), recipe.teacher_top_k
        teacher.write_teacher(dense, texts, top_k, recipe.temperature, compute, folder)

    return store.get("teacher", _identity(dense, recipe, tokens), make)


def _texts(recipe: Distilling, tokens: dict[str, Tokens]) -> list[Tokens]:
    return [tokens[name] for name in sources(recipe.phases)]


def _identity(dense: Checkpoint, recipe: Distilling, tokens: dict[str, Tokens]) -> dict[str, Any]:
    return {
        "model": dense.fingerprint,
        "dtype": dense.dtype,
        "data": sorted({text.fingerprint for text in _texts(recipe, tokens)}),
        "top_k": recipe.teacher_top_k,
        "temperature": recipe.temperature,
        "code": code_version(teacher, layerwise, stream, activations, layers, remapped),
    }
