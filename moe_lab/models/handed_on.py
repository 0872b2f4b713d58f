"""What decoder layers hand on beside the hidden state, found by running a model without them.

Some families' layers return more, which the next ones are given: which tokens a sparse attention
looked at, or a router's state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.layers import Output
from moe_lab.types import UserError


class NotLayerwise(UserError):
    """A family whose decoder layers cannot be computed one after the other alone."""


class Decoders(NamedTuple):
    """A model and its decoder layers; open(index) keeps the weights of one in memory."""

    model: PreTrainedModel
    layers: nn.ModuleList
    open: Callable[[int], AbstractContextManager[nn.Module | None]]


@contextmanager
def forwards(layers: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """While open, every one of these layers computes this."""
    layers = list(layers)
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class HandedOn(NamedTuple):
    """What a model's decoder layers return beside the hidden state, and the next ones get.

    names: the argument that takes each of these; None where none does. Empty for layers that
    return the hidden state alone.
    """

    names: tuple[str | None, ...]
    is_tuple: bool

    @classmethod
    def found(cls, decoders: Decoders, batch: Mapping[str, Tensor]) -> HandedOn:
        """Found on a batch; NotLayerwise where a layer gets what only those before it know."""
        layer = decoders.layers[0]
        told = inspect.signature(type(layer).forward).return_annotation
        is_plain = told in (Tensor, "torch.Tensor", "Tensor")
        found = cls((), False) if is_plain else cls._looked_at(decoders, batch)
        _, one = found.caught(decoders, batch)
        _, other = found.caught(decoders, batch, change=1.0)
        for index, (some, others) in enumerate(zip(one, other, strict=True)):
            for name in sorted(some.keys() - set(found.names)):
                if not _equal(some[name], others[name]):
                    raise NotLayerwise(
                        f"{type(layer).__name__} {index} is given {name}, which the model computes "
                        "from the layers before it: this family cannot go layer by layer "
                        "(compute.layerwise=false keeps the whole model in memory)"
                    )
        return found

    @classmethod
    def _looked_at(cls, decoders: Decoders, batch: Mapping[str, Tensor]) -> HandedOn:
        """By running the first layer, and looking where what it returns arrives."""
        outputs: list[Any] = []
        names: list[str | None] = []

        def look(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
            layer = decoders.layers[len(outputs)]
            given = _bound(layer, hidden, arguments, named)
            if not outputs:
                with decoders.open(0):
                    outputs.append(type(layer).forward(layer, hidden, **given))
                if not isinstance(outputs[0], tuple):
                    raise _Looked
                marks = (None if one is None else one.clone() for one in outputs[0][1:])
                outputs[0] = (hidden, *marks)
                return outputs[0]
            at = {id(value): name for name, value in given.items()}
            names.extend(None if one is None else at.get(id(one)) for one in outputs[0][1:])
            raise _Looked

        with torch.no_grad(), forwards(decoders.layers, look), suppress(_Looked):
            decoders.model.base_model(**batch, use_cache=False)
        if not isinstance(outputs[0], tuple):
            return cls((), False)
        return cls(tuple(names) or (None,) * len(outputs[0][1:]), True)

    def like(self, hidden: Tensor) -> Any:
        """A layer's output with this hidden state, and nothing else."""
        return (hidden, *(None for _ in self.names)) if self.is_tuple else hidden

    def caught(
        self, decoders: Decoders, batch: Mapping[str, Tensor], change: float = 0.0
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """The first layer's hidden state, and what each is given beside it.

        change: what every layer adds to the hidden state; else it is handed on as it is.
        """
        first: list[Tensor] = []
        caught: list[dict[str, Any]] = []

        def note(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
            first.append(hidden)
            given = _bound(decoders.layers[len(caught)], hidden, arguments, named)
            caught.append(given | {"past_key_values": None, "use_cache": False})
            return self.like(hidden + change if change else hidden)

        with torch.no_grad(), forwards(decoders.layers, note):
            decoders.model.base_model(**batch, use_cache=False)
        return first[0], caught

    def taken(self, output: Output, layer: nn.Module) -> dict[str, Any]:
        """What a layer's output hands on, by the argument that takes it."""
        if isinstance(output, tuple) != self.is_tuple:
            raise UserError(
                f"{type(layer).__name__} returns something else than the first decoder layer: this "
                "family cannot go layer by layer (compute.layerwise=false)"
            )
        if not self.is_tuple:
            return {}
        pairs = zip(self.names, output[1:], strict=True)
        return {name: value for name, value in pairs if name is not None}


class _Looked(Exception):
    """Ends a forward pass of which enough was seen."""


def _bound(
    layer: nn.Module, hidden: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """What a layer is given beside the hidden state, all by name."""
    bound = inspect.signature(type(layer).forward).bind(layer, hidden, *arguments, **named)
    kinds = {one.name: one.kind for one in bound.signature.parameters.values()}
    given = dict(list(bound.arguments.items())[2:])
    for name in [name for name in given if kinds[name] == inspect.Parameter.VAR_KEYWORD]:
        given |= given.pop(name)
    return given


def _equal(one: Any, other: Any) -> bool:
    """Whether all tensors in two like structures are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_equal(one[key], other.get(key)) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True
