"""What a checkpoint's config promises, its folder has: looked at when a checkpoint was written.

Whatever is missing fails far away, in somebody's engine. So is a promise that the source has not
kept itself; that one is told, not refused.
"""

from __future__ import annotations

import filecmp
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_lab.models.config_file import text_part
from moe_lab.models.folder import code_files, text_files, texts_in_json
from moe_lab.models.layers import COUNT_FIELDS
from moe_lab.models.mtp_saving import MTP_COUNTS, MTP_SWITCHES
from moe_lab.models.own_config import read_config
from moe_lab.models.stored import Stored, stored_in
from moe_lab.models.weight_files import weight_files

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_MTP = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
EMBEDDINGS = ("embed_tokens.weight", ".embeddings.weight", ".wte.weight")
_QUANTISED = re.compile(r"scale|zero|packed|qweight|_blocks$|absmax")  # names beside such weights


class PromiseBroken(RuntimeError):
    """A config that says what its folder has not: an error of moe_lab's."""


def check_promises(folder: Path, source: Path) -> None:
    """Compare what a written checkpoint's configs promise with its files, and those of `source`.

    Raises PromiseBroken for what the source has and this folder has not; warns of the rest.
    """
    before, ours = set(broken_promises(source)), []
    for broken in broken_promises(folder):
        if broken in before:
            logger.warning("saving: as at its source, %s", broken)
        else:
            ours.append(broken)
    ours += _other_files(folder, source)
    if ours:
        raise PromiseBroken(f"{folder}: {'; '.join(ours)}. Please report this")


def broken_promises(folder: Path) -> Iterator[str]:
    """What the configs of a checkpoint promise and its files have not, a sentence each."""
    values = read_config(folder / "config.json")
    stored = {one.key: one for file in weight_files(folder) for one in stored_in(file)}
    yield from _missing_code(folder)
    if values.get("quantization_config") and not any(map(_is_quantised, stored.values())):
        yield "its config has a quantization_config, and none of its tensors is quantised"
    text = text_part(values)
    yield from _missing_mtp(text, stored)
    yield from _other_head(values, stored)
    counts = {field: text[field] for field in COUNT_FIELDS if isinstance(text.get(field), int)}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{field}={number}" for field, number in counts.items())
        yield f"its config has different numbers of experts: {told}"


def _missing_code(folder: Path) -> Iterator[str]:
    for file in texts_in_json(folder):
        told = json.loads(file.read_text(errors="replace")) if _names_code(file) else {}
        named = told.get("auto_map", {}) if isinstance(told, dict) else {}
        for entry in _entries(named):
            module = entry.split(".")[0]
            if "--" not in entry and not (folder / f"{module}.py").is_file():
                yield f"{file.name} names {module}.py (auto_map), which is not there"


def _names_code(file: Path) -> bool:
    return '"auto_map"' in file.read_text(errors="replace")


def _entries(named: Any) -> Iterator[str]:
    """The classes of an auto_map, of which some entries are lists with nulls."""
    if isinstance(named, str):
        yield named
    elif isinstance(named, Mapping):
        for one in named.values():
            yield from _entries(one)
    elif isinstance(named, list):
        for one in named:
            yield from _entries(one)


def _is_quantised(one: Stored) -> bool:
    return one.dtype is None or bool(_QUANTISED.search(one.key.rpartition(".")[2]))


def _missing_mtp(text: Mapping[str, Any], stored: Mapping[str, Stored]) -> Iterator[str]:
    promised = {field: text[field] for field in (*MTP_COUNTS, *MTP_SWITCHES) if text.get(field)}
    layers = text.get("num_hidden_layers")
    if not promised or not isinstance(layers, int):
        return
    behind = (match for match in map(_LAYER.search, stored) if match)
    if any(map(_MTP.search, stored)) or any(int(match[1]) >= layers for match in behind):
        return
    told = ", ".join(f"{field}={number}" for field, number in promised.items())
    yield f"its config promises MTP layers ({told}), and its files hold none"


def _other_head(values: dict[str, Any], stored: Mapping[str, Stored]) -> Iterator[str]:
    """A head beside an embedding that it is tied to, and that is another tensor."""
    heads = [key for key in stored if key.endswith("lm_head.weight")]
    embeddings = [key for key in stored if key.endswith(EMBEDDINGS)]
    if values.get("tie_word_embeddings") and len(heads) == len(embeddings) == 1:
        head, embedding = (stored[key].load() for key in (heads[0], embeddings[0]))
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            yield f"its config ties the head to the embedding, and {heads[0]} is another tensor"


def _other_files(folder: Path, source: Path) -> Iterator[str]:
    """Tokenizer, chat template, processor and generation files, byte for byte the source's."""
    for file in [*text_files(source), *code_files(source)]:
        name = file.relative_to(source)
        if not (folder / name).is_file() or not filecmp.cmp(file, folder / name, shallow=False):
            yield f"{name} is not that of {source}"
