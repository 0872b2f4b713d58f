"""Tiny random checkpoints of any family with the tokenizer of a shipped one."""

from __future__ import annotations

import shutil
from pathlib import Path

from families import tiny_model

from moe_lab.files import PACKAGE

SHIPPED = PACKAGE / "checkpoints"
SHARD = "300KB"  # of which these models have several


def random_model(folder: Path, family: str, **changes: object) -> Path:
    """A tiny random checkpoint of a family with the tokenizer of a shipped one."""
    tiny_model(family, vocab_size=2048, **changes).save_pretrained(folder, max_shard_size=SHARD)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / "tiny_mixtral" / name, folder / name)
    return folder
