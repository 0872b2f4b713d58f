"""Experts of different widths in a checkpoint's files: each with its own size, without padding.

Where the experts of a layer are unevenly wide (`widths.py`), each tensor that holds their hidden
units stands in the files as one for each expert, by the model's own name of it with the expert's
number behind (docs/form.md); of an expert without any hidden unit there is none. They are cut when
transformers writes a model, and put together again whenever tensors are loaded.
Letters: E experts, W hidden units of the widest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moe_lab.models.hidden_units import HiddenUnits, unit_parameters
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.widths import is_uneven, widths_of
from moe_lab.types import UserError

_NUMBERED = re.compile(r"^(?P<name>.+)\.(?P<expert>\d+)$")


@dataclass(frozen=True)
class UnevenTensor:
    """One tensor of the experts of a layer whose widths differ.

    shape: of the parameter; matrix: of the view of it [E, ...] that has a row for each expert;
    axis: in which one expert's row has hidden units; places: where, by how many it has. Rows behind
    those of the E experts are no expert's, and kept as they are.
    """

    shape: torch.Size
    matrix: torch.Size
    axis: int
    widths: tuple[int, ...]
    places: Callable[[int], Tensor]

    def rows(self, parameter: Tensor) -> Tensor:
        """The parameter with one row for each expert, and those behind."""
        return parameter.reshape(-1, *self.matrix[1:])

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return self.shape.numel() // self.matrix[1:].numel()

    def row_shape(self, row: int) -> tuple[int, ...]:
        """The shape of a row in the files."""
        shape = list(self.matrix[1:])
        if row < len(self.widths):
            shape[self.axis] = shape[self.axis] * self.widths[row] // self._most
        return tuple(shape)

    @property
    def _most(self) -> int:
        return max(self.widths)

    def in_files(self, parameter: Tensor) -> dict[int, Tensor]:
        """The rows as they stand in the files, by number; none of an expert without units."""
        rows, found = self.rows(parameter), {}
        for number, row in enumerate(rows):
            if number >= len(self.widths):
                found[number] = row.clone()
            elif width := self.widths[number]:
                found[number] = row.index_select(self.axis, self._from(width).to(row.device))
        return found

    def whole(self, parts: Mapping[int, Tensor]) -> Tensor:
        """The parameter that these rows are, with zeros where an expert has no unit."""
        made = next(iter(parts.values())).new_zeros((self.num_rows, *self.matrix[1:]))
        for number, part in parts.items():
            if number >= len(self.widths):
                made[number] = part
            else:
                place = self._from(self.widths[number]).to(part.device)
                made[number].index_copy_(self.axis, place, part)
        return made.reshape(self.shape)

    def _from(self, width: int) -> Tensor:
        """Where in a whole row the entries of a row in the files stand, in their order."""
        here, there = self.places(self._most)[:width].flatten(), self.places(width).flatten()
        return here[there.argsort()]


class Joined:
    """A parameter that is put together of its rows in the files when it is read, as a slice."""

    def __init__(self, tensor: UnevenTensor, parts: Mapping[int, Any]):
        self.tensor, self.parts = tensor, parts

    def __getitem__(self, index: Any) -> Tensor:
        whole = self.tensor.whole({number: part[...] for number, part in self.parts.items()})
        return whole[index]

    def get_shape(self) -> list[int]:
        """As of a slice."""
        return list(self.tensor.shape)


def uneven_tensors(model: PreTrainedModel) -> dict[str, UnevenTensor]:
    """By the name of the parameter, of all layers whose experts' widths differ."""
    if not any(map(is_uneven, model.modules())):
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [layer for layer in moe_layers(model) if is_uneven(layer.experts)]
    return {key: one for layer in layers for key, one in _of_layer(layer, names)}


def _of_layer(layer: MoELayer, names: Mapping[int, str]) -> Iterable[tuple[str, UnevenTensor]]:
    units, widths = HiddenUnits(layer.experts), widths_of(layer.experts)
    parameters = unit_parameters(layer.experts)
    for name, (axis, place_IN) in units.places.items():
        matrix, parameter = units.tensors[name], parameters[name]

        def places(width: int, both: bool = place_IN.shape[1] == 2) -> Tensor:
            return units.places_of_width(width, both)

        yield (
            names[id(parameter)],
            UnevenTensor(parameter.shape, matrix.shape, axis, widths, places),
        )


def name_in_model(key: str, uneven: Mapping[str, UnevenTensor]) -> str:
    """The name of the parameter of which a tensor in the files is a row; else its own."""
    match = _NUMBERED.match(key)
    return match["name"] if match and match["name"] in uneven else key


def cut_apart(
    model: PreTrainedModel, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's tensors by name: those that stay as they are, and the rows of the others."""
    uneven, rest, rows = uneven_tensors(model), dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        if name in uneven:
            of_it = uneven[name].in_files(tensor)
            rows |= {f"{name}.{number}": row for number, row in of_it.items()}
        else:
            rest[name] = tensor
    return rest, rows


def joined(model: PreTrainedModel, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `cut_apart`, of tensors or slices of files; what lacks a row is left out.

    UserError for a row of another shape than its expert's width asks for.
    """
    uneven = uneven_tensors(model)
    found, parts = dict[str, Any](), dict[str, dict[int, Any]]()
    for key, tensor in tensors.items():
        name = name_in_model(key, uneven)
        if name == key:
            found[key] = tensor
        else:
            parts.setdefault(name, {})[int(key.rpartition(".")[2])] = tensor
    for name, rows in parts.items():
        one = uneven[name]
        _check_rows(name, one, rows)
        needed = (n for n in range(one.num_rows) if n >= len(one.widths) or one.widths[n])
        if rows.keys() >= set(needed):
            found[name] = Joined(one, rows)
            if any(isinstance(row, Tensor) for row in rows.values()):
                found[name] = found[name][...]
    return found


def _check_rows(name: str, tensor: UnevenTensor, rows: Mapping[int, Any]) -> None:
    for number, row in rows.items():
        shape = row.shape if isinstance(row, Tensor) else row.get_shape()
        wanted = tensor.row_shape(number) if number < tensor.num_rows else None
        if wanted is None or tuple(shape) != wanted:
            asked = f"for {list(wanted)}" if wanted else f"for no more than {tensor.num_rows}"
            raise UserError(
                f"{name}.{number} is {list(shape)} in its files, and config.json asks {asked} "
                "(expert_widths)"
            )


def load_tensors(
    model: PreTrainedModel, tensors: Mapping[str, Any], how: LoadStateDictConfig
) -> Any:
    """Fill a model with tensors by their names on disk, by transformers' own function."""
    info, _ = convert_and_load_state_dict_in_model(model, joined(model, tensors), how)
    return info
