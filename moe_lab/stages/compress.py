"""Compress: carry out a plan and write the result as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from moe_lab import depth, editing, merging, moe, saving, stand_ins
from moe_lab.checkpoint import Checkpoint
from moe_lab.compute import Compute
from moe_lab.editing import apply_plan
from moe_lab.saving import save
from moe_lab.store import Artifact, Store, code_version
from moe_lab.types import Plan


def compress(store: Store, checkpoint: Checkpoint, plan: Artifact, compute: Compute) -> Artifact:
    """A folder with checkpoint/ and form.json, which says whether stock transformers loads it."""

    def make(folder: Path) -> None:
        model = checkpoint.load()
        edits = Plan.load(plan.folder / "plan.json")
        apply_plan(model, edits)
        padding = edits.notes.get("padding")
        form = save(model, folder / "checkpoint", checkpoint.path, padding)
        (folder / "form.json").write_text(json.dumps(form.to_json()) + "\n")

    identity = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "plan": plan.key,
        "code": code_version(depth, editing, merging, moe, saving, stand_ins),
    }
    return store.get("compress", identity, make)
