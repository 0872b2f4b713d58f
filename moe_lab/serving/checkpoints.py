"""A checkpoint that is to be served: what it is, and what it should compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_lab.files import CHECKPOINT
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.form_kinds import family_named, form_kind
from moe_lab.models.own_config import family_values
from moe_lab.serving.making import COMPUTED, INTACT, prompts_for, stored
from moe_lab.serving.subjects import Subject
from moe_lab.store import Store


@dataclass(frozen=True)
class Served:
    """A checkpoint that is to be served.

    subject: the name of the model that it comes from; made: of the recipe; family, form: as
    `form_kinds` says; key: by which its answers are remembered; prompts: token ids.
    """

    subject: str
    made: str
    family: str
    form: str
    folder: Path
    key: str
    prompts: list[list[int]]
    reference: dict[str, Tensor]

    @property
    def name(self) -> str:
        """By which it is told from all others."""
        return f"{self.subject} / {self.made}"


def made_checkpoint(store: Store, subject: Subject, made: str) -> Served:
    """A checkpoint of a subject, and what transformers computes with it in float32."""
    dense = stored(store, subject, INTACT)
    result = dense if made == INTACT else stored(store, subject, made)
    folder = result.folder / CHECKPOINT
    config, source = (_config(one.folder / CHECKPOINT) for one in (result, dense))
    prompts = prompts_for(Checkpoint(dense.folder / CHECKPOINT))
    reference = load_file(result.folder / COMPUTED)
    ends = torch.tensor(family_values(config).get("eos_token_id") or [], dtype=torch.long)
    reference["ends"] = torch.isin(reference["tokens"], ends)
    return Served(
        subject.name, made, family_named(config), form_kind(config, source), folder, result.key,
        prompts, reference,
    )  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values
