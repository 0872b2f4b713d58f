"""Convert: a checkpoint of a family that transformers does not read, in its native form, once."""

from __future__ import annotations

from pathlib import Path

from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT
from moe_lab.models.checkpoint import Original, size_in_bytes
from moe_lab.models.families import base
from moe_lab.store import Artifact, Store, check_writable


def convert(store: Store, original: Original) -> Artifact:
    """A folder with checkpoint/; UserError where the disk has no room for it."""

    def make(folder: Path) -> None:
        check_writable(store.root, size_in_bytes(original.path))
        original.convert(folder / CHECKPOINT)

    identity = {
        "model": original.fingerprint,
        "texts": original.texts_fingerprint,
        "code": code_version(original.family, base),
    }
    return store.get("convert", identity, make)
