"""Teach: the intact model's next-token distributions over the text of a recipe that distils."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.finetune import teacher
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.opening import text_config
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact, Store, check_writable
from moe_lab.types import UserError

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teaching:
    """A teacher, the texts that it reads, and what is kept of its distributions (`Distilling`)."""

    dense: Checkpoint
    texts: tuple[Tokens, ...]
    top_k: int | None
    temperature: float

    def identity(self) -> dict[str, Any]:
        """What its distributions depend on."""
        return {
            "model": self.dense.fingerprint,
            "dtype": self.dense.dtype,
            "data": sorted({text.fingerprint for text in self.texts}),
            "top_k": self.top_k,
            "temperature": self.temperature,
            "code": code_version(teach),
        }


def teach(context: Context, asked: Teaching) -> Artifact:
    """A folder that `teacher.Teacher` reads: shared by all jobs that tune on the same text."""

    def make(folder: Path) -> None:
        teacher.write_teacher(
            asked.dense, asked.texts, asked.top_k, asked.temperature, context.compute, folder
        )

    return context.store.get("teacher", asked.identity(), make, together=True)


def check_teacher(store: Store, asked: Teaching) -> None:
    """Refuse a teacher for which the disk has no room, with a UserError."""
    if store.find("teacher", asked.identity()) is not None:
        return
    vocabulary = text_config(asked.dense.config).vocab_size
    if asked.top_k is not None and asked.top_k > vocabulary:
        logger.info("asked for finetune.teacher_top_k=%d, given all %d tokens of the vocabulary",
                    asked.top_k, vocabulary)  # fmt: skip
    try:
        check_writable(store.root, teacher.teacher_bytes(asked.texts, vocabulary, asked.top_k))
    except UserError as error:
        kept = asked.top_k or vocabulary
        raise UserError(
            f"finetune.teacher_top_k={asked.top_k} keeps {kept:,} probabilities for "
            f"each token of the tuning text: {error}; or ask for fewer probabilities, or text"
        ) from error


def teaching_of(run: Run) -> Teaching | None:
    """What the run's recipe is taught, where it learns from the intact model."""
    recipe = run.distilling
    if recipe is None:
        return None
    texts = tuple(run.tuning_texts.values())
    return Teaching(run.dense, texts, recipe.teacher_top_k, recipe.temperature)


def _inputs(run: Run) -> dict[str, Teaching]:
    asked = teaching_of(run) if run.tunes else None
    return {"teacher": asked} if asked else {}


def _read(run: Run, name: str, result: Artifact) -> None:
    """Only the tuning reads it."""


STAGE = Stage(_inputs, teach, _read)
