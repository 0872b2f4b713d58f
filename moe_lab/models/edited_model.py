"""What edits leave of a model, tensor by tensor and in the form in which it is saved.

Found without weights, so that it is known before any is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.condensing import edited_blocks
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import restructure_model
from moe_lab.models.forms import Form, choose_form, padding_limit
from moe_lab.models.in_form import in_form
from moe_lab.models.layerwise import decoder_layers
from moe_lab.models.own_config import OWN, QUANTISED
from moe_lab.models.stored import in_files
from moe_lab.types import LmHeadName, MtpName

REST = -1  # in the place of a decoder layer's number: all that is in none


@dataclass(frozen=True)
class Saving:
    """How a checkpoint is written.

    padding: zeros make narrow dense layers as wide as the family's config has all of them, if that
    adds at most this share of the model's parameters; else the exact sizes are saved in our own
    form. None: as at the source where it says so, else 0.01. convert: superset, and the model may
    become one of another family that computes the same and says more (`superset.py`), where its own
    cannot hold it. mtp: what becomes of the MTP layers of the source (`mtp.py`); the form says so.
    lm_head: whether a head that is the embedding is written as a tensor of its own (`head.py`).
    twins: layers with fewer experts than others are filled up with copies of their own, where that
    changes nothing (as with one expert for each token) and adds at most this share; the config says
    how many were there before (`distinct_experts`).
    """

    padding: float | None = None
    convert: str | None = None
    mtp: MtpName = "prune"
    lm_head: LmHeadName = "auto"
    twins: float = 0.0

    def form_of(self, model: PreTrainedModel) -> Form:
        """The form that an edited model gets."""
        limit = padding_limit(model.config, self.padding)
        return choose_form(model, limit, self.twins, self.convert)


class EditedModel:
    """What edits leave of a model, in the form in which it is saved, without weights.

    model: it; form: which one; numbers: the new number of each decoder layer that stays; path:
    where the decoder layers are. Given the form, it is not looked for: twins are found by what a
    router computes, which needs its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        edits: Sequence[Edit],
        how: Saving,
        form: Form | None = None,
    ):
        for part in (model.config, model.config.get_text_config(decoder=True)):
            say_dequantised(part)
        self.path, decoders = decoder_layers(model)
        removed = {edit.index for edit in edits if edit.removes_decoder}
        kept = [index for index in range(len(decoders)) if index not in removed]
        self.numbers = {old: new for new, old in enumerate(kept)}
        self._old = dict(enumerate(kept))
        restructure_model(model, edits)
        self.form = form or how.form_of(model)
        self.has_edited_blocks = bool(edited_blocks(model))
        self.model = in_form(model, self.form)

    def old_name(self, name: str) -> str:
        """The name that a tensor of the result had in the source."""
        index = self.index_of(name)
        if index == REST:
            return name
        return f"{self.path}.{self._old[index]}.{name.removeprefix(f'{self.path}.{index}.')}"

    def index_of(self, name: str) -> int:
        """The number of the decoder layer that a tensor of the model is of; else REST."""
        inside = name.removeprefix(f"{self.path}.") if name.startswith(f"{self.path}.") else ""
        number = inside.split(".")[0]
        return int(number) if number.isdigit() else REST

    def piece(self, index: int) -> dict[str, Tensor]:
        """The tensors of a decoder layer, by its new number, or with REST all others."""
        tensors = self.model.state_dict(keep_vars=True).items()
        return {name: tensor for name, tensor in tensors if self.index_of(name) == index}

    def in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model as they stand in files, by their names there."""
        left_out = self.model._keys_to_ignore_on_save or ()
        told = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        return in_files(self.model, told)


def say_dequantised(config: Any) -> None:
    """Let a config say nothing of quantised weights: what is written is dequantised."""
    vars(config).pop("quantization_config", None)
    own = getattr(config, OWN, None)
    if own and own.pop(QUANTISED, None) and not own["layers"]:
        delattr(config, OWN)


def meta_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model, as it stands in memory, without weights."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor) for tensor in tensors}
    twin: PreTrainedModel = copy.deepcopy(model, memo)
    # A model that came from fused files would be written fused; engines want per-expert names.
    vars(twin)["_weight_conversions"] = None
    return twin


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, requires_grad=False) if is_parameter else empty
