"""A checkpoint's folder, looked through before any of its weights is read.

All that can be wrong with it is told here, in one message: links that lead out, a config that no
model can be built of, weights that are damaged or not those of the config, experts that a token
cannot get, and tokens that the embedding does not have.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lab.models.building import built_config, built_model
from moe_lab.models.config_file import NAME, check_values, config_values, text_part, unheeded
from moe_lab.models.families.base import check_original, family_of
from moe_lab.models.fitting import check_fit
from moe_lab.models.folder import check_links
from moe_lab.models.layers import TOP_K_FIELDS
from moe_lab.models.stored import INDEX
from moe_lab.models.weight_files import MERGE, checked_weights, weight_files
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)
_TOKENS = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")
Stamp = tuple[tuple[str, int, int], ...]


def check_folder(folder: Path, ignored: Sequence[str] = ()) -> None:
    """Refuse, with a UserError, a folder that is no checkpoint that could be loaded and compressed.

    Only headers are read. A folder that has not changed since is not looked through again. ignored:
    patterns of the names of tensors that the family does not know and that may be lost.
    """
    if not (folder / NAME).is_file():
        raise UserError(f"{folder} holds no checkpoint: {NAME} is missing{_instead(folder)}")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} has an adapter beside the model, which readers that know adapters would add "
            f"to it, and others not. {MERGE}; or remove adapter_config.json"
        )
    check_links(folder)
    _check(folder, tuple(ignored), stamp_of(folder))


@functools.lru_cache(maxsize=256)
def _check(folder: Path, ignored: tuple[str, ...], stamp: Stamp) -> None:
    values, files = config_values(folder), weight_files(folder)
    check_values(folder / NAME, values, checked_weights(folder))
    family = family_of(values["model_type"])
    if family is not None:
        check_original(family, values, files)
        return
    if told := unheeded(values):
        logger.info(
            "%s names code for computing (%s): it is not followed", folder / NAME, ", ".join(told)
        )
    check_fit(folder, built_model(folder, built_config(folder)), files, ignored)


def check_routing(folder: Path, layers: Sequence[LayerInfo]) -> None:
    """Refuse MoE layers whose tokens cannot get as many experts as the config says."""
    told = text_part(config_values(folder))
    field = next((name for name in TOP_K_FIELDS if name in told), "experts for each token")
    for info in layers:
        if not 0 < info.top_k <= info.num_rows:
            raise UserError(
                f"{folder / NAME}: {field}={info.top_k}, and layer {info.index} has "
                f"{info.num_rows} experts: it must be from 1 to {info.num_rows}"
            )
        if not 0 < info.groups_used <= info.groups or info.num_experts % info.groups:
            raise UserError(
                f"{folder / NAME}: the router of layer {info.index} chooses {info.groups_used} of "
                f"{info.groups} groups of its {info.num_experts} experts (n_group, topk_group)"
            )


def check_tokens(folder: Path, tokenizer: Any, size: int) -> None:
    """Refuse a tokenizer with a token whose id the embedding has no row for.

    Of one that only its class adds, in none of the folder's files and no beginning, end or padding,
    it is said: it stands in a text only where somebody writes it out.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= size}
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if not beyond:
        return
    paths = (folder / name for name in _TOKENS)
    files = "".join(path.read_text(errors="replace") for path in paths if path.is_file())
    by_class = {
        number
        for number, token in beyond.items()
        if number not in used
        and not any(json.dumps(token, ensure_ascii=plain) in files for plain in (True, False))
    }
    number = max(beyond.keys() - by_class, default=max(beyond))
    more = f", as {len(beyond) - 1} others" if len(beyond) > 1 else ""
    told = (
        f"{folder}: its tokenizer gives {beyond[number]!r} the id {number}{more}, and the "
        f"embedding has {size} rows, 0 to {size - 1} ({NAME}: vocab_size)"
    )
    if beyond.keys() <= by_class:
        logger.warning("%s: no text may hold it", told)
        return
    raise UserError(f"{told}. Is the tokenizer that of this model?")


def stamp_of(folder: Path) -> Stamp:
    """What tells a checkpoint's config and weights from those that were there before."""
    files = [folder / NAME, folder / INDEX, *weight_files(folder)]
    stats = ((str(file), file.stat()) for file in files if file.exists())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _instead(folder: Path) -> str:
    """What lies there in the place of a config.json."""
    there = {file.name for file in folder.iterdir()}
    if "adapter_config.json" in there:
        return f", and an adapter is there. {MERGE}"
    if "params.json" in there:
        return (
            ". params.json is that of the publisher's own format; the one of transformers lies "
            "in another repository or folder"
        )
    inner = sorted(file.parent.name for file in folder.glob(f"*/{NAME}"))
    return f"; there is one in {', '.join(inner[:3])}: give that folder" if inner else ""
