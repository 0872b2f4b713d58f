"""What makes a folder of weights a checkpoint: its configs, its text files, what no model holds."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from moe_lab.models.building import built_config
from moe_lab.models.engine_config import complete_config
from moe_lab.models.fitting import inside_modules
from moe_lab.models.folder import code_files, copy_beside, text_files
from moe_lab.models.forms import Form
from moe_lab.models.layerwise import decoder_layers
from moe_lab.models.mtp import find_mtp
from moe_lab.models.mtp_saving import carry_mtp
from moe_lab.models.narrowing import EAGER, fits_grouped
from moe_lab.models.opening import text_config, text_values
from moe_lab.models.own_config import read_config, write_config
from moe_lab.models.promises import check_promises
from moe_lab.models.stored import (
    Held,
    Stored,
    carry_over,
    dtype_name,
)
from moe_lab.models.weight_files import weight_files
from moe_lab.types import MtpName

logger = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A checkpoint whose weights and plain config are in `folder`.

    model: what was written, which may be without weights; before: the model at `source`, without
    weights; files: what the files there hold.
    """

    model: PreTrainedModel
    before: PreTrainedModel
    files: Held
    source: Path
    folder: Path


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """What transformers writes beside the weights of a model, which may be without them."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype_name(model.dtype)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def finish_checkpoint(
    saved: Saved, form: Form, mtp: MtpName, head: str, read_back: Callable[[], None]
) -> Form:
    """Everything of a checkpoint that is not its model's weights; the form, with what is told.

    read_back: compares the checkpoint with the model, before its MTP layers come to it.
    """
    model, before, files, source, folder = saved
    mtp_layers = find_mtp(before.config, weight_files(source))
    _adapt_config(folder / "config.json", source / "config.json", model.config)
    if form.stock and not fits_grouped(model):
        _ask_for_eager(folder / "config.json")
    carry_over(_passing_by(files, before, model, mtp_layers.files), folder)
    copy_text_files(source, folder)
    read_back()
    told = carry_mtp(mtp_layers, built_config(source), model, source, folder, mtp, form.stock)
    check_promises(folder, source)
    for sentence in filter(None, (told, head)):
        logger.info(sentence)
    return replace(form, mtp=told, head=head)


def _adapt_config(path: Path, source: Path, config: Any) -> None:
    values, told = map(read_config, (path, source))
    _tell_dtypes(values, told)
    complete_config(text_values(values, config), text_config(config))
    write_config(path, values)


def _ask_for_eager(path: Path) -> None:
    """Let transformers compute the experts by the code that takes any width."""
    write_config(path, read_config(path) | {"experts_implementation": EAGER})


def _tell_dtypes(values: dict[str, Any], told: dict[str, Any], whole: bool = True) -> None:
    # What transformers writes is the dtype of one parameter, or the one that was computed in.
    dtype = told.get("dtype", told.get("torch_dtype"))
    if dtype is not None or not whole:
        values.pop("dtype", None)
    if dtype is not None:
        values["dtype"] = dtype
    for key, part in values.items():
        if isinstance(part, dict) and isinstance(told.get(key), dict):
            _tell_dtypes(part, told[key], whole=False)


def _passing_by(
    files: Held, before: PreTrainedModel, model: PreTrainedModel, of_mtp: Collection[str]
) -> list[Stored]:
    """What the files hold beside the model's tensors, as far as it still belongs to its layers.

    of_mtp: the names in the files that `carry_mtp` sees to.
    """
    number, left = (text_config(one.config).num_hidden_layers for one in (before, model))
    every = {
        name: parts
        for name, parts in files.others.items()
        if not any(one.key in of_mtp for one in parts)
    }
    if lost := inside_modules(before, every):
        logger.warning(
            "saving: %d tensors of modules that do not know them are left out: %s",
            len(lost), ", ".join(lost[:4]),
        )  # fmt: skip
        every = {name: parts for name, parts in every.items() if name not in lost}
    if number != left:
        inside = re.compile(rf"^{re.escape(decoder_layers(before)[0])}\.\d+\.")
        if gone := [name for name in sorted(every) if inside.match(name)]:
            logger.warning(
                "saving: %d tensors of decoder layers that the model does not load are left out, "
                "since its layers have other numbers now: %s", len(gone), ", ".join(gone[:4]),
            )  # fmt: skip
        every = {name: parts for name, parts in every.items() if name not in gone}
    return [part for parts in every.values() for part in parts]


def copy_text_files(source: Path, folder: Path) -> None:
    """Bring all files of a checkpoint but its config and weights along, byte for byte."""
    for file in [*text_files(source), *code_files(source)]:
        copy_beside(file, source, folder)
