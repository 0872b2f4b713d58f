"""How text is decoded in evaluation, and what log-likelihoods are made of.

A class each, in a file of its own, whose fields are its options. Every variant of a run is decoded
the same way. A figure on held-out text (`eval.held_out`) is the model's alone, whatever decodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from moe_lab.chosen import ChosenBy, all_options
from moe_lab.lookup import named
from moe_lab.models.checkpoint import Model
from moe_lab.models.predictions import head_at, logits_at
from moe_lab.option import Plugin, check_options, plain_options
from moe_lab.types import LayerInfo, UserError

DECODING_FILES = (str(__package__), "base")  # and the file there that is no decoding
PLAIN = "greedy"


class Decoder:
    """One model as it is decoded: the model's own logits, and transformers' own loop.

    loop: in the place of that loop, what `generate` takes as its `custom_generate`.
    shares_prompts: whether texts may go on from what `cache` gave of their beginning.
    """

    loop: Callable[..., Tensor] | None = None
    shares_prompts = True

    def __init__(self, model: Model):
        self.model = model

    def logits(self, ids_BL: Tensor, chosen_BL: Tensor, cache: Any = None) -> Tensor:
        """Logits [N, V] of which a softmax gives the probabilities of log-likelihoods.

        chosen_BL: where they are wanted; cache: of what stands before, which takes in these ids.
        """
        told = {"use_cache": False} if cache is None else {"past_key_values": cache}
        return logits_at(self.model, chosen_BL, input_ids=ids_BL, **told)

    def cache(self, ids_BL: Tensor) -> Any:
        """The model's cache behind these ids, of which none is padding."""
        nowhere_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        with head_at(self.model, nowhere_BL):
            return self.model(input_ids=ids_BL, use_cache=True).past_key_values

    def generated(self, ids_BL: Tensor, tokens: int) -> Tensor:
        """Prompts without padding, and so many tokens behind each, whatever they say."""
        model: Any = self.model  # some of what it needs is typed as a tensor
        ids: Tensor = model.generate(
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            custom_generate=self.loop,
        )
        return ids


class Decoding(Plugin, ABC):
    """A way to decode; its options are its fields.

    `opened` has to be there. What else may be:
    check(layers): refuses, with a UserError, what is impossible for a model with these MoE layers;
    by default values that are out of the range which their `Option` says.
    name: how reports call it; by default its file's name.
    """

    @property
    def name(self) -> str:
        """How reports call it."""
        return type(self).__module__.rpartition(".")[2]

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse what is impossible for a model with these MoE layers."""
        check_options(self, "decoding")

    @abstractmethod
    def opened(self, model: Model) -> AbstractContextManager[Decoder]:
        """While open, the model is decoded so; UserError where its routers do not obey."""


DECODINGS: ChosenBy[Decoding] = ChosenBy(
    "decoding", str(__package__), Decoding, ("base",), of="eval"
)


def as_decoding(given: Decoding | str) -> Decoding:
    """A decoding, also by name (a file of this package, or a dotted path), with its defaults."""
    return DECODINGS.made(given)


def decoding_identity(given: object) -> dict[str, Any]:
    """What results depend on: its name, and what it says of its options.

    given: its composed node; its name, which leaves the defaults.
    """
    decoding, options = _with_options(given)
    return {"name": decoding.name} | decoding.identity(options)


def decoding_told(given: object) -> dict[str, Any]:
    """What a report says of a decoding: its name and its own options. given: as above."""
    try:
        decoding, options = _with_options(given)
    except UserError:  # told when the suite is checked
        return {"decoding": given}
    return {"decoding": decoding.name} | plain_options(decoding.identity(options))


def _with_options(given: object) -> tuple[Decoding, dict[str, Any]]:
    """A decoding, and all its options by name."""
    if isinstance(given, Mapping):
        chosen = {name: value for name, value in given.items() if not name.startswith("_")}
        kind = named("decoding", str(given.get("_target_")), __package__, Decoding)
        decoding: Decoding = kind(**chosen)
    else:
        decoding = as_decoding(str(given))
    return decoding, all_options(decoding, given)
