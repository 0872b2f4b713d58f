"""Tiny checkpoints of several families, written once, and copies of them that are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from families import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from wrappers import write_wrapper

from moe_lab.models.checkpoint import resolve
from moe_lab.types import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WRAPPER = "qwen3_vl_moe"
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", WRAPPER)
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERTS = "<number of experts>"  # the field that the family has for it


def write_intact(kind: str, folder: Path, tokenizer: Any, **options: Any) -> None:
    """A tiny checkpoint; options: as of `save_pretrained`."""
    if kind == WRAPPER:
        write_wrapper(kind, folder, tokenizer)
        return
    model = tiny_model(kind, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def copied(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def set_config(folder: Path, changes: Mapping[str, Any]) -> Path:
    """Write other values into config.json: at the top, or where the text model is described."""
    values = config(folder)
    text = values.get("text_config", values)
    for name, value in changes.items():
        names = [one for one in COUNTS if one in text] if name == EXPERTS else [name]
        for one in names:
            part = values if one in values and one not in text else text
            part[one] = value
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def set_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Write other tensors into the one weight file."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def refusal(folder: Path, **options: Any) -> str | None:
    """What is said of a folder before any stage: as a run looks at it; None where it is taken."""
    try:
        checkpoint = resolve(folder, **options)
        checkpoint.layers()
        checkpoint.tokenizer()
    except UserError as error:
        return str(error)
    return None
