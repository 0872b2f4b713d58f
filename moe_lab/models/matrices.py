"""The matrices of a checkpoint that may be stored in few bits: which there are, and of what part.

Those of experts and of linear layers inside decoder layers, by their names in the files. Routers,
gates of shared experts, embeddings and the head are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.condensing import edited_blocks
from moe_lab.models.experts import OneExpert
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.layerwise import decoder_layers
from moe_lab.models.stored import Stored

What = Literal["experts", "dense", "attention", "all"]
_FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|moe|expert")
_ATTENTION = re.compile(r"attn|attention")
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class WeightMatrix:
    """One matrix in a checkpoint's files, or those of all experts of a layer in one tensor.

    name: of the tensor of the model that it is, or is a part of; part: which `What` but all, or
    "other", as of layers with a state; layer: its decoder layer; expert: its number there, None
    where it is none's or all's. shape: [out, in] or [experts, out, in]; axis: of the file's tensor
    along which the inputs run, -1 or -2. of_units: whether its inputs are an expert's hidden units.
    """

    stored: Stored
    name: str
    part: str
    layer: int
    shape: tuple[int, ...]
    axis: int = -1
    expert: int | None = None
    of_units: bool = False

    @property
    def key(self) -> str:
        """Its name in the files."""
        return self.stored.key

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers, and of the scales that it will have."""
        assert self.stored.dtype is not None
        return self.stored.dtype

    @property
    def width(self) -> int:
        """How many inputs it has."""
        return self.shape[-1]

    @property
    def num_weights(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()

    @property
    def is_own(self) -> bool:
        """Whether it is a tensor of its own, named as a linear module's: so others pack them."""
        return len(self.shape) == 2 and self.key.endswith(".weight")

    def load(self) -> Tensor:
        """It, [..., out, in]."""
        tensor = self.stored.load()
        return tensor if self.axis == -1 else tensor.mT.contiguous()


@dataclass(frozen=True)
class WeightMatrices:
    """All matrices of a checkpoint, and what else its files hold.

    left: linear modules that are never packed, by their paths in the files and in the model; rest:
    the keys of all other tensors.
    """

    every: tuple[WeightMatrix, ...]
    left: tuple[str, ...]
    rest: tuple[str, ...]

    def chosen(self, what: str) -> list[WeightMatrix]:
        """Those that an option's value asks for."""
        return [one for one in self.every if what in ("all", one.part)]

    def by_layer(self) -> dict[int, list[WeightMatrix]]:
        """By decoder layer, in order."""
        found: dict[int, list[WeightMatrix]] = {}
        for one in self.every:
            found.setdefault(one.layer, []).append(one)
        return dict(sorted(found.items()))


def matrices_of(checkpoint: Checkpoint) -> WeightMatrices:
    """The matrices of a checkpoint: only headers are read."""
    model = meta_model(checkpoint.config)
    held = checkpoint.held_by(model)
    sorts = _Sorts(model)
    every, left, rest = list[WeightMatrix](), dict[str, None](), list[str]()
    for name, parts in held.by_name.items():
        part = sorts.part_of(name)
        if part and all(len(one.shape) in (2, 3) and one.dtype for one in parts):
            every += [_matrix(one, name, part, sorts) for one in parts]
            continue
        rest += [one.key for one in parts]
        if sorts.is_linear(name):
            left |= {one.key.removesuffix(".weight"): None for one in parts}
            left[name.removesuffix(".weight")] = None
    others = [one for parts in held.others.values() for one in parts]
    left |= {one.key.removesuffix(".weight"): None for one in others if len(one.shape) == 2}
    return WeightMatrices(tuple(every), tuple(left), (*rest, *(one.key for one in others)))


class _Sorts:
    """What each tensor of a model is of."""

    def __init__(self, model: PreTrainedModel):
        self.model, layers = model, moe_layers(model)
        self.path, _ = decoder_layers(model)
        self.experts: Mapping[nn.Module, MoELayer] = {layer.experts: layer for layer in layers}
        self.gates = set(_gates(layers))
        self.blocks = {layer.info.name.rpartition(".")[2] for layer in layers}
        self.blocks |= {path.rpartition(".")[2] for path in edited_blocks(model)}

    def part_of(self, name: str) -> str | None:
        """Of which part a tensor is; None for one that is never packed."""
        if not name.startswith(f"{self.path}."):
            return None
        path, _, kind = name.rpartition(".")
        module = self.model.get_submodule(path)
        if isinstance(module, OneExpert):
            return "dense" if kind.endswith("_proj") else None
        if module in self.experts:
            return "experts" if kind.endswith("_proj") else None
        if not isinstance(module, nn.Linear) or module in self.gates or kind != "weight":
            return None
        child = name.removeprefix(f"{self.path}.").split(".")[1]
        if _ATTENTION.search(child):
            return "attention"
        return "dense" if child in self.blocks or _FEED_FORWARD.search(child) else "other"

    def is_linear(self, name: str) -> bool:
        """Whether a tensor is what readers take for a linear layer's matrix."""
        path, _, kind = name.rpartition(".")
        module = self.model.get_submodule(path)
        return kind == "weight" and (isinstance(module, nn.Linear) or module in self.gates)

    def layer_of(self, name: str) -> int:
        """The decoder layer of a tensor."""
        return int(name.removeprefix(f"{self.path}.").split(".")[0])


def _gates(layers: Sequence[MoELayer]) -> Iterator[nn.Module]:
    for layer in layers:
        for holder in (layer.router, layer.shared_gate):
            yield from holder.modules() if holder else ()


def _matrix(one: Stored, name: str, part: str, sorts: _Sorts) -> WeightMatrix:
    path, _, kind = name.rpartition(".")
    module = sorts.model.get_submodule(path)
    of_experts = module in sorts.experts or isinstance(module, OneExpert)
    as_in_model = len(one.shape) == 3 or one.key.rpartition(".")[0] == name  # or a row of that
    transposed = of_experts and as_in_model and bool(getattr(module, "is_transposed", False))
    *front, first, second = one.shape
    shape = (*front, second, first) if transposed else one.shape
    expert = None
    if module in sorts.experts and len(one.shape) == 2:
        # Of a matrix for each expert the last number in its name is the expert's.
        expert = int(_NUMBER.findall(one.key)[-1])
    of_units = of_experts and kind == "down_proj"
    layer, axis = sorts.layer_of(name), -2 if transposed else -1
    return WeightMatrix(one, name, part, layer, shape, axis, expert, of_units)
