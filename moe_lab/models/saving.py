"""Writing an edited model so that it can be read again, by stock transformers where possible.

Where the family's own config can say an edited structure, it is saved so. Otherwise `config.json`
carries it in "moe_lab", and it is replayed on the model before the weights come in.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moe_lab.models.checkpoint import meta_model, no_bars, text_files
from moe_lab.models.editing import NoMLP, edited_blocks, prune_layer, set_block
from moe_lab.models.forms import Form, choose_form, dense_names, padding_limit
from moe_lab.models.layers import COUNT_FIELDS, moe_layers
from moe_lab.models.mtp_saving import carry_mtp
from moe_lab.models.routers import with_twins
from moe_lab.types import MtpName

logger = logging.getLogger(__name__)


def save_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    source: Path,
    padding: float | None = None,
    twins: float = 0.0,
    mtp: MtpName = "prune",
) -> Form:
    """Write an edited model as a checkpoint, in the form that is returned.

    Parameters are written in the dtype of the checkpoint at `source`, whose tokenizer comes along.
    padding: zeros make narrow dense layers as wide as the family's config has all of them, if that
    adds at most this share of the model's parameters; else the exact sizes are saved in our own
    form. None: as at `source` where it says so, else 0.01. twins: layers with fewer experts than
    others are filled up with copies of their own, where that changes nothing (as with one expert
    for each token) and adds at most this share; the config says how many were there before
    (`distinct_experts`). mtp: what becomes of the MTP layers that lie at `source` (`mtp.py`); the
    form says so. The model is not changed except for its dtype, its config and those two.
    """
    original = AutoConfig.from_pretrained(source, local_files_only=True)
    if hasattr(model.config, "distinct_experts"):  # of the source: its copies may be edited by now
        del model.config.distinct_experts
    form = choose_form(model, padding_limit(model.config, padding), twins)
    if not form.plain:
        logger.info("saving: %s", form.reason)
    edited = edited_blocks(model)
    if form.num_experts:
        for layer in moe_layers(model):
            prune_layer(layer, with_twins(layer.info.num_experts, form.num_experts))
    model.config = form.config
    if edited and form.stock:
        _make_native(model, edited)
    _to_stored_dtype(model, original.dtype)
    # A model that came from fused files would be written fused; engines want per-expert names.
    vars(model)["_weight_conversions"] = None
    with no_bars():
        model.save_pretrained(folder)
    _write_count_aliases(folder / "config.json", model.config)
    copy_text_files(source, folder)
    told = carry_mtp(original, model, source, folder, mtp, form.stock)
    if told:
        logger.info(told)
    return replace(form, mtp=told)


@torch.no_grad()
def _make_native(model: PreTrainedModel, edited: dict[str, nn.Module]) -> None:
    """Replace our dense MLPs by the family's, zero-padded to its one width for dense layers."""
    built = meta_model(model.config)
    reference = model.get_input_embeddings().get_parameter("weight")
    for name in dense_names(model) | set(edited):
        source, target = model.get_submodule(name), built.get_submodule(name)
        target.to_empty(device=reference.device).to(reference.dtype)
        for parameter in target.parameters():
            parameter.zero_()
        for projection in (
            ("gate_proj", "up_proj", "down_proj") if type(source) is not NoMLP else ()
        ):
            weight = getattr(source, projection).weight
            rows, columns = weight.shape
            getattr(target, projection).weight[:rows, :columns] = weight
            bias = getattr(getattr(source, projection), "bias", None)
            if bias is not None:
                getattr(target, projection).bias[:rows] = bias
        set_block(model, name, target)


def _to_stored_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if dtype and parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _write_count_aliases(path: Path, config: Any) -> None:
    # transformers 5 writes Qwen3-MoE's count as num_local_experts alone, 4.x reads num_experts.
    values = json.loads(path.read_text())
    written = [field for field in COUNT_FIELDS if field in values]
    for field in ("num_experts", "num_local_experts"):
        if written and field not in values and hasattr(config, field):
            values[field] = values[written[0]]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def copy_text_files(source: Path, folder: Path) -> None:
    """Bring the tokenizer and generation files of a checkpoint along, byte for byte."""
    for file in text_files(source):
        shutil.copyfile(file, folder / file.name)
