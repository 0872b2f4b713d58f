"""Compress: carry out a plan and write the result as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from moe_lab.compute import Compute
from moe_lab.files import CHECKPOINT, FORM, PLAN
from moe_lab.models import depth, editing, forms, layers, merging, own_form, remapped, saving
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.saving import save_checkpoint
from moe_lab.store import Artifact, Store, code_version


def compress(store: Store, checkpoint: Checkpoint, plan: Artifact, compute: Compute) -> Artifact:
    """A folder with checkpoint/ and form.json, which says whether stock transformers loads it."""

    edits = Plan.load(plan.folder / PLAN)

    def make(folder: Path) -> None:
        model = checkpoint.load()
        apply_plan(model, edits)
        padding = edits.notes.get("padding")
        form = save_checkpoint(model, folder / CHECKPOINT, checkpoint.path, padding)
        (folder / FORM).write_text(json.dumps(form.to_json()) + "\n")

    code: list[object] = [depth, editing, merging, layers, saving, forms, own_form, remapped]
    code += [apply_plan, Edit]
    for edit in edits.edited():
        code += [type(edit), *edit.code()]
    identity = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "plan": plan.key,
        "code": code_version(*code),
    }
    return store.get("compress", identity, make)
