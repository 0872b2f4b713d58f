"""Taking whole decoder layers out of a model, so that its own family can say the result."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_lab.models.layers import module_list
from moe_lab.models.opening import text_config
from moe_lab.types import UserError

INDEX_LISTS = ("mlp_only_layers", "moe_layers")
PREFIX_COUNTS = ("first_k_dense_replace", "num_dense_layers")


def drop_decoders(model: PreTrainedModel, path: str, dropped: Collection[int]) -> None:
    """Take the decoder layers `dropped` out of the list of them at `path`, in place.

    The others are renumbered, in the config, too, and where their attention keeps the number under
    which it finds its part of the KV cache. Raises UserError, before anything is changed, where
    the family's config cannot describe the rest.
    """
    text, decoders = text_config(model.config), module_list(model, path)
    number = text.num_hidden_layers
    if len(decoders) != number:
        raise UserError(
            f"{text.model_type} has {len(decoders)} decoder layers and counts {number} in its "
            "config: none can be taken out; method=drop_layers works with this family"
        )
    kept = [i for i in range(number) if i not in dropped]
    if not kept:
        raise UserError("all decoder layers would be dropped: at least one must stay")
    _check(model, path, kept)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(decoders[i] for i in kept))
    for new, old in enumerate(kept):
        for module in decoders[old].modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = new
    cut_config(model.config, kept)


def cut_config(config: Any, kept: Sequence[int]) -> None:
    """Make a config describe only the decoder layers `kept`, in place.

    Lists with an entry per layer are cut, lists of indices renumbered, numbers of leading dense
    layers recounted, and so is what moe_lab itself wrote.
    """
    text = text_config(config)
    number, new = text.num_hidden_layers, {old: i for i, old in enumerate(kept)}
    step = getattr(text, "decoder_sparse_step", 1)
    if step > 1:  # every other layer is dense: that does not survive, a list does
        dense = {i for i in range(number) if (i + 1) % step} | set(text.mlp_only_layers)
        text.mlp_only_layers, text.decoder_sparse_step = sorted(dense), 1
    for key, value in list(vars(text).items()):
        if key in INDEX_LISTS and isinstance(value, list):
            setattr(text, key, [new[i] for i in value if i in new])
        elif key in PREFIX_COUNTS and isinstance(value, int):
            setattr(text, key, sum(i < value for i in kept))
        elif isinstance(value, list) and len(value) == number:
            setattr(text, key, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    if getattr(config, "moe_lab", None):
        layers = config.moe_lab["layers"].items()
        cut = {str(new[int(i)]): layer for i, layer in layers if int(i) in new}
        config.moe_lab = config.moe_lab | {"layers": cut}


def _check(model: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    """Build both models without weights: each layer must come out as it was."""
    config = copy.deepcopy(model.config)
    try:
        with torch.device("meta"):
            before = type(model)(copy.deepcopy(model.config))
            cut_config(config, kept)
            after = type(model)(type(config).from_dict(config.to_dict()))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"the config of {type(model).__name__} cannot describe fewer decoder layers: {error}; "
            "method=drop_layers works with this family"
        ) from error
    for new, old in enumerate(kept):
        one, other = (module_list(m, path)[i] for m, i in ((before, old), (after, new)))
        if nature(one) != nature(other):
            raise UserError(
                f"decoder layer {old} would be another layer as number {new}: the config of "
                f"{type(model).__name__} cannot say which of its layers were dropped; "
                "method=drop_layers works with this family"
            )


def nature(decoder: nn.Module, without: str | None = None) -> dict[str, Any]:
    """What a decoder layer is: its classes, its tensors' shapes, all plain values but its number.

    without: the name of a child that does not count, nor what the layer itself says of it.
    """
    plain = (bool, int, float, str, type(None))
    found: dict[str, Any] = {}
    for path, module in decoder.named_modules():
        if without is not None and path.split(".")[0] == without:
            continue
        found[f"{path}:"] = type(module)
        tensors = [*module._parameters.items(), *module._buffers.items()]
        found |= {f"{path}.{key}": tuple(t.shape) for key, t in tensors if t is not None}
        if path or without is None:
            values = vars(module).items()
            found |= {
                f"{path}.{key}": value
                for key, value in values
                if isinstance(value, plain) and key != "layer_idx"
            }
    return found
