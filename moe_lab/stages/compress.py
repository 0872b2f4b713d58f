"""Compress: carry out a plan and write the result as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from moe_lab.compute import Compute
from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT, FORM, PLAN
from moe_lab.models import depth, editing, forms, layers, merging, own_form, remapped, saving
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.editing import apply_plan
from moe_lab.models.saving import save_checkpoint
from moe_lab.store import Artifact, Store
from moe_lab.types import Plan


def compress(store: Store, checkpoint: Checkpoint, plan: Artifact, compute: Compute) -> Artifact:
    """A folder with checkpoint/ and form.json, which says whether stock transformers loads it."""

    def make(folder: Path) -> None:
        model = checkpoint.load()
        edits = Plan.load(plan.folder / PLAN)
        apply_plan(model, edits)
        padding = edits.notes.get("padding")
        form = save_checkpoint(model, folder / CHECKPOINT, checkpoint.path, padding)
        (folder / FORM).write_text(json.dumps(form.to_json()) + "\n")

    identity = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "plan": plan.key,
        "code": code_version(depth, editing, merging, layers, saving, forms, own_form, remapped),
    }
    return store.get("compress", identity, make)
