"""The head of a model that shares it with the embedding, written as a tensor of its own.

transformers and vLLM take the embedding for a head that a checkpoint says is tied to it. llama.cpp
does so family by family: of some it demands the tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_lab.models.checking import Stamp, stamp_of
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.forms import Form
from moe_lab.models.layers import moe_layers
from moe_lab.models.opening import text_config
from moe_lab.types import LayerInfo, UserError

# Families of which llama.cpp has no model without `output.weight` (tried with build b11549).
NEED_A_HEAD = ("dots1", "gpt_oss", "minimax_m2", "olmoe", "qwen2_moe")


def check_head(config: Any, how: str) -> None:
    """Refuse a head tied to an embedding that is another tensor."""
    if how == "tied" and not text_config(config).tie_word_embeddings:
        raise UserError(
            f"method.lm_head=tied: this {config.model_type} has a head of its own, which is not "
            "its embedding; method.lm_head=auto keeps it"
        )


def sized_with_head(
    checkpoint: Checkpoint, layers: Sequence[LayerInfo], how: str
) -> list[LayerInfo]:
    """The layers with the bytes of a model that is written with the head that `how` gives it."""
    if not _wanted(checkpoint.config, how):
        return list(layers)
    size = _bytes_of_head(checkpoint, stamp_of(checkpoint.path))
    return [replace(one, model_bytes=one.model_bytes + size) for one in layers]


@functools.lru_cache(maxsize=64)
def _bytes_of_head(checkpoint: Checkpoint, _: Stamp) -> int:
    """Of a head that is its embedding, as a tensor of its own; 0 of one that is another."""
    model = meta_model(checkpoint.config)
    if not _shares(model):
        return 0
    embedding = model.get_input_embeddings().get_parameter("weight")
    name = next(name for name, one in model.named_parameters() if one is embedding)
    stored = checkpoint.held_by(model).dtype(name) or embedding.dtype
    return embedding.numel() * stored.itemsize


@torch.no_grad()
def untie_head(model: PreTrainedModel, how: str, form: Form) -> str:
    """Give the model a head of its own, a copy of the embedding, where `how` says so, in place.

    auto: in its family's own form alone, since no converter reads another, and where each of its
    layers has experts, since llama.cpp has no dense ones in these families. Returns what was done
    in a sentence, "" for nothing.
    """
    number = text_config(model.config).num_hidden_layers
    if not _shares(model):
        _say_untied(model)  # also where a config says so of a family that has no tied head
    if how == "auto" and not (form.stock and len(moe_layers(model)) == number):
        return ""
    if not _untied(model, how):
        return ""
    embedding = model.get_input_embeddings().get_parameter("weight")
    model.get_output_embeddings().weight = nn.Parameter(embedding.detach().clone())
    _say_untied(model)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    size = embedding.numel() * embedding.element_size()
    why = "which llama.cpp wants of this family" if how == "auto" else "as method.lm_head=untied"
    return (
        f"the head is written beside the embedding that it equals, {why}: {size / 2**20:.3g} MiB "
        "more, which no number of parameters counts (method.lm_head=tied: without)"
    )


def repeated_head(model: PreTrainedModel) -> int:
    """Parameters of a head that is a tensor of its own, and equals the embedding; else 0.

    Also 0 of a model without weights, of which nobody knows.
    """
    if model.get_output_embeddings() is None or _shares(model):
        return 0
    head = model.get_output_embeddings().get_parameter("weight")
    embedding = model.get_input_embeddings().get_parameter("weight")
    if head.is_meta or head.shape != embedding.shape:
        return 0
    same = torch.equal(head, embedding.to(head.device))
    return head.numel() if same else 0


def _untied(model: PreTrainedModel, how: str) -> bool:
    """Whether a model's head is to become a tensor of its own, as far as its family says that."""
    return _wanted(model.config, how) and _shares(model)


def _wanted(config: Any, how: str) -> bool:
    return how == "untied" or (how == "auto" and config.model_type in NEED_A_HEAD)


def _shares(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().get_parameter("weight")
    return head is not None and head.get_parameter("weight") is embedding


def _say_untied(model: PreTrainedModel) -> None:
    for config in (model.config, text_config(model.config)):
        config.tie_word_embeddings = False
