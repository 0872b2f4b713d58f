"""Writing an edited model so that it can be read again, by stock transformers where possible.

Where the family's own config can say an edited structure, it is saved so. Otherwise in our own form
(`own_config.py`), whose structures are replayed on the model before the weights come in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from moe_lab.models.building import built_config
from moe_lab.models.checkpoint import meta_model
from moe_lab.models.engine_config import complete_config
from moe_lab.models.fitting import inside_modules
from moe_lab.models.folder import code_files, copy_beside, text_files
from moe_lab.models.forms import Form, choose_form, padding_limit
from moe_lab.models.head import untie_head
from moe_lab.models.in_form import in_form
from moe_lab.models.layerwise import decoder_layers
from moe_lab.models.mtp import find_mtp
from moe_lab.models.mtp_saving import carry_mtp
from moe_lab.models.narrowing import EAGER, fits_grouped
from moe_lab.models.opening import no_bars, text_config, text_values
from moe_lab.models.own_config import read_config, write_config
from moe_lab.models.promises import check_promises
from moe_lab.models.reading_back import check_logits, check_saved, few_logits
from moe_lab.models.stored import (
    Held,
    Stored,
    as_stored,
    carry_over,
    dtype_name,
    held_by,
    round_as_stored,
)
from moe_lab.models.weight_files import weight_files
from moe_lab.types import LmHeadName, MtpName

logger = logging.getLogger(__name__)


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    source: Path,
    padding: float | None = None,
    twins: float = 0.0,
    convert: str | None = None,
    mtp: MtpName = "prune",
    lm_head: LmHeadName = "auto",
) -> Form:
    """Write an edited model as a checkpoint, in the form that is returned.

    Parameters are written in the dtype of the checkpoint at `source`, whose tokenizer comes along.
    padding: zeros make narrow dense layers as wide as the family's config has all of them, if that
    adds at most this share of the model's parameters; else the exact sizes are saved in our own
    form. None: as at `source` where it says so, else 0.01. twins: layers with fewer experts than
    others are filled up with copies of their own, where that changes nothing (as with one expert
    for each token) and adds at most this share; the config says how many were there before
    (`distinct_experts`). convert: superset, and the model may become one of another family that
    computes the same and says more (`superset.py`), where its own cannot hold it. mtp: what becomes
    of the MTP layers that lie at `source` (`mtp.py`); the form says so. lm_head: whether a head
    that is the embedding is written as a tensor of its own (`head.py`). The model is not changed
    except for its dtype, its config, its head and the experts that are filled up. What was written
    is read back and compared (`reading_back.py`), and its config with its folder (`promises.py`).
    """
    original = built_config(source)
    before = meta_model(original)
    files = held_by(before, weight_files(source))
    if hasattr(model.config, "distinct_experts"):  # of the source: its copies may be edited by now
        del model.config.distinct_experts
    form = choose_form(model, padding_limit(model.config, padding), twins, convert)
    if not form.plain:
        logger.info("saving: %s", form.reason)
    computing = model.get_input_embeddings().get_parameter("weight").dtype
    round_as_stored(model, files, original.dtype, computing)
    expected = few_logits(model)
    check_logits(expected, computing)
    model = in_form(model, form)
    as_stored(model, files, original.dtype)
    head = untie_head(model, lm_head, form)
    # A model that came from fused files would be written fused; engines want per-expert names.
    vars(model)["_weight_conversions"] = None
    with no_bars():
        model.save_pretrained(folder)
    saved = Saved(model, before, files, source, folder)
    return finish_checkpoint(
        saved, form, mtp, head, lambda: check_saved(model, folder, expected, computing)
    )


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
