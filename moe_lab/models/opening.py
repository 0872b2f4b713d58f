"""Which class of transformers opens a checkpoint: the one that holds all of it.

A wrapper is a model of several kinds of input, whose text model is one part beside towers for
images or sound. Opened as a plain language model it would lose them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from moe_lab.types import UserError

ENCODER_DECODER = (
    "it is an encoder-decoder: it has experts in an encoder, too, and is no causal language model, "
    "which is what moe_lab calibrates, edits and evaluates"
)


def text_config(config: Any) -> Any:
    """The part of a config that describes its text model: the config itself where it has no other.

    Counts of experts and of layers, lists of layers and the vocabulary stand there.
    """
    return config.get_text_config(decoder=True)


def num_positions(config: Any) -> int | None:
    """How many tokens the text model takes at most, as its config says; None where it does not."""
    said = getattr(text_config(config), "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype that a config names for the weights in its files; float32 where it names none."""
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def text_values(values: dict[str, Any], config: Any) -> dict[str, Any]:
    """The part of a config's JSON object, `values`, that says its `text_config`."""
    wanted = text_config(config)
    if config is wanted:
        return values
    parts = ((name, getattr(config, name, None)) for name in config.sub_configs)
    name, part = next((name, part) for name, part in parts if part and text_config(part) is wanted)
    inner: dict[str, Any] = text_values(values[name], part)
    return inner


def is_wrapper(config: Any) -> bool:
    """Whether the text model is only one part of what this config describes."""
    return text_config(config) is not config


def model_class(config: Any) -> Any:
    """The auto class that opens a checkpoint with this config.

    The one whose model its "architectures" name; else for a wrapper the one of wrappers, for others
    AutoModelForCausalLM where transformers maps the family there. Raises UserError where there is
    no language model of this type.
    """
    if config.is_encoder_decoder:
        raise UserError(f"the family {config.model_type!r} cannot be opened: {ENCODER_DECODER}")
    of_wrappers = AutoModelForMultimodalLM, AutoModelForImageTextToText
    order: list[Any] = [AutoModelForCausalLM, *of_wrappers]
    if is_wrapper(config):
        order = [*of_wrappers, AutoModelForCausalLM]
    known = [auto for auto in order if type(config) in auto._model_mapping]
    if not known:
        raise UserError(
            f"the family {config.model_type!r} cannot be opened: transformers has no language "
            "model of this type, neither of text alone nor of text beside images or sound"
        )
    kinds = {auto: auto._model_mapping[type(config)] for auto in known}
    written_by = (config.architectures or [None])[0]
    chosen = next((auto for auto in known if kinds[auto].__name__ == written_by), known[0])
    if kinds[chosen].forward is nn.Module.forward:
        raise UserError(
            f"the family {config.model_type!r} cannot be opened: {kinds[chosen].__name__} has no "
            "forward pass of its own, only those of its parts. Save the part that reads text (its "
            "thinker) as a checkpoint by itself, and give that"
        )
    return chosen


def empty_model(config: Any, **options: Any) -> PreTrainedModel:
    """A model of this config without weights; options: as of `from_config`."""
    with torch.device("meta"), empty_tensors():
        model: PreTrainedModel = model_class(config).from_config(copy.deepcopy(config), **options)
    model.eval()
    return model


@contextmanager
def empty_tensors() -> Iterator[None]:
    """Let shared experts have no hidden units, as of what `superset.py` made, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield


@contextmanager
def no_bars() -> Iterator[None]:
    """Silence transformers' own bars, which finish before anyone reads them."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
