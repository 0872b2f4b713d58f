"""Compress: carry out a plan and write the result as a checkpoint, layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT, FORM, PLAN
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan
from moe_lab.models.mtp_saving import foresee_mtp
from moe_lab.models.streamed import Saving, write_edited
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run


@dataclass(frozen=True)
class Compression:
    """A model, and the result of the plan for it."""

    dense: Checkpoint
    plan: Artifact


def compress(context: Context, asked: Compression) -> Artifact:
    """A folder with checkpoint/ and form.json, which says whether stock transformers loads it."""
    plan = Plan.load(asked.plan.folder / PLAN)

    def make(folder: Path) -> None:
        mtp, head = plan.notes.get("mtp", "prune"), plan.notes.get("lm_head", "auto")
        foresee_mtp(asked.dense, plan.edited(), mtp)
        padding, convert = (plan.notes.get(name) for name in ("padding", "convert"))
        how = Saving(padding, convert, mtp, head)
        form = write_edited(asked.dense, plan, folder / CHECKPOINT, how)
        (folder / FORM).write_text(json.dumps(form.to_json()) + "\n")

    identity = {
        "model": asked.dense.fingerprint,
        "texts": asked.dense.texts_fingerprint,
        "dtype": asked.dense.dtype,
        "plan": asked.plan.key,
        "code": code_version(compress, *plan.kinds()),
    }
    return context.store.get("compress", identity, make)


def _inputs(run: Run) -> dict[str, Compression]:
    """Nothing where the plan changes nothing, as where each group has a plan of its own."""
    planned = run.results["plan"]
    edited = Plan.load(planned.folder / PLAN).edited()
    return {"compress": Compression(run.dense, planned)} if edited else {}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.add_made("compressed", result)


STAGE = Stage(_inputs, compress, _read)
