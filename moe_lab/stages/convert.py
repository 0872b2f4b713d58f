"""Convert: a checkpoint of a family that transformers does not read, in its native form, once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT
from moe_lab.models.checkpoint import Original
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact, check_writable

if TYPE_CHECKING:
    from moe_lab.stages.run import Run


def convert(context: Context, original: Original) -> Artifact:
    """A folder with checkpoint/; UserError where the disk has no room for it."""

    def make(folder: Path) -> None:
        check_writable(context.store.root, size_in_bytes(original.path))
        original.convert(folder / CHECKPOINT)

    identity = {
        "model": original.fingerprint,
        "texts": original.texts_fingerprint,
        "code": code_version(convert, original.family),
    }
    return context.store.get("convert", identity, make)


def _inputs(run: Run) -> dict[str, Original]:
    return {"convert": run.dense} if isinstance(run.dense, Original) else {}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.add_made("dense", result)


STAGE = Stage(_inputs, convert, _read)
