"""MTP layers: those behind a model's own, with which an engine drafts more than one token ahead.

transformers does not load their tensors with the model. They are found in its files by structure
(a tensor that the model does not take, of a decoder layer behind the last, or below a component
`mtp`) and pass by, from safetensors to safetensors, one source file in memory at a time. What they
draft the model itself accepts or not: they decide its speed, never its output.

Engines build them from the config of all layers, so that they must have as many experts as those.
No statistics are known of them: of each of their blocks the experts with the longest router rows
stay (MC-Suite, 2504.05586), which does not look at what the experts are quantised to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.layers import SHARED_NAMES, moe_layers
from moe_lab.models.opening import text_config
from moe_lab.models.stored import held_by
from moe_lab.types import MtpName, NotFinite, UserError

_COMPONENT = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
EXPERT = re.compile(r"^(?P<block>.+)\.experts\.(?:(?P<number>\d+)\.)?(?P<rest>.+)$")


@dataclass(frozen=True)
class MtpLayers:
    """The MTP tensors of a checkpoint; empty where it has none.

    files: by name, where each lies; shapes: by name; decoders: paths of the list of decoder layers
    in these names; behind: how many decoder layers the model has, from where such lists count on;
    groups: of the router, which choose experts among themselves.
    """

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    decoders: tuple[str, ...]
    behind: int
    groups: int = 1

    @functools.cached_property
    def num_experts(self) -> dict[str, int]:
        """How many routed experts each MoE block has, by its path; a dense one is not there."""
        numbers: dict[str, set[int]] = {}
        for name, shape in self.shapes.items():
            if match := EXPERT.match(name):
                of_block = numbers.setdefault(match["block"], set())
                of_block.update([int(match["number"])] if match["number"] else range(shape[0]))
        for block, found in numbers.items():
            if found != set(range(len(found))):
                raise UserError(
                    f"{block}: the MTP layer's experts are not numbered from 0 to {len(found) - 1}"
                )
        return {block: len(found) for block, found in numbers.items()}


def untaken_tensors(model: PreTrainedModel | Any, files: Iterable[Path]) -> list[str]:
    """Names, as in the safetensors files, of the tensors that a model does not take, in order.

    model: with or without weights, or its config.
    """
    model = model if isinstance(model, PreTrainedModel) else meta_model(model)
    others = held_by(model, files).others.values()
    return sorted(one.key for parts in others for one in parts)


def find_mtp(config: Any, files: Sequence[Path]) -> MtpLayers:
    """The MTP tensors among a checkpoint's files; its model is built only where there may be some.

    config: the checkpoint's.
    """
    behind = text_config(config).num_hidden_layers
    where = dict(_names(files))
    if not any(_may_be_mtp(name, behind) for name in where):
        return MtpLayers({}, {}, (), behind)
    model = meta_model(config)
    untaken = set(untaken_tensors(model, files))
    decoders = decoder_lists((name for name in where if name not in untaken), behind)
    mine = {
        name: where[name]
        for name in sorted(untaken)
        if _COMPONENT.search(name) or decoder_number(name, decoders) >= behind
    }
    groups = next((layer.info.groups for layer in moe_layers(model)), 1)
    return MtpLayers(mine, _shapes(mine), decoders, behind, groups)


def _names(files: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for file in files:
        with safe_open(file, "pt") as handle:
            for name in list(handle.keys()):  # the handle itself cannot be iterated
                yield name, file


def _shapes(files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for file in dict.fromkeys(files.values()):
        with safe_open(file, "pt") as handle:
            for name in (name for name, its in files.items() if its == file):
                shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes


def _may_be_mtp(name: str, behind: int) -> bool:
    numbers = [m for m in _NUMBER.finditer(name) if not name[: m.start()].endswith("experts.")]
    return bool(_COMPONENT.search(name)) or any(int(m[1]) >= behind for m in numbers)


def decoder_lists(taken: Iterable[str], behind: int) -> tuple[str, ...]:
    """The paths below which the files have all decoder layers of the model, by number."""
    numbers: dict[str, set[int]] = {}
    for name in taken:
        for match in _NUMBER.finditer(name):
            numbers.setdefault(name[: match.start() - 1], set()).add(int(match[1]))
    return tuple(path for path, found in numbers.items() if found == set(range(behind)))


def decoder_number(name: str, decoders: Iterable[str]) -> int:
    """The number of the decoder layer that a tensor belongs to; -1 for one of none."""
    for path in decoders:
        if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
            return int(match[1])
    return -1


def experts_left(
    mtp: MtpLayers, counts: Collection[int], stock: bool, how: MtpName
) -> dict[str, int]:
    """To how many experts each MoE block of the MTP layers is pruned; blocks left whole are absent.

    counts: how many experts the model's own layers have in the end. UserError for `keep` where the
    family's form cannot say it.
    """
    if how == "drop" or len(set(counts)) != 1:
        return {}
    number = next(iter(counts))
    less = {block: number for block, whole in mtp.num_experts.items() if whole > number}
    if how == "prune" or not less:
        return less
    if stock:
        whole = max(mtp.num_experts.values())
        raise UserError(
            f"method.mtp=keep would leave the MTP layers' {whole} experts while all other layers "
            f"have {number}: the family's config has one number for all, so that no engine could "
            "load the result. method.mtp=prune prunes them, too (with method.mtp=drop they go); "
            "a ratio that leaves layers different numbers, such as ratio=global, keeps them whole"
        )
    return {}


@torch.no_grad()
def kept_experts(mtp: MtpLayers, block: str, number: int) -> list[int]:
    """The `number` experts of a block with the longest router rows, ascending; each group alike."""
    rows_ED = _router(mtp, block)
    norm_GE = torch.linalg.vector_norm(rows_ED.double(), dim=1).view(mtp.groups, -1)
    size, stay = norm_GE.shape[1], number // mtp.groups
    order = norm_GE.argsort(dim=1, descending=True, stable=True)[:, :stay].tolist()
    return sorted(group * size + expert for group, row in enumerate(order) for expert in row)


def _router(mtp: MtpLayers, block: str) -> Tensor:
    """The router's weight [E, D] of one of the MTP layers' blocks."""
    experts = mtp.num_experts[block]
    for name, shape in mtp.shapes.items():
        if of_router(name, block) and len(shape) == 2 and experts in shape and min(shape) > 1:
            with safe_open(mtp.files[name], "pt") as handle:
                weight: Tensor = handle.get_tensor(name)
            return checked(name, weight).movedim(shape.index(experts), 0)
    raise UserError(
        f"{block}: the MTP layer's router was not found, so that its experts cannot be pruned; "
        "method.mtp=drop leaves the MTP layers out"
    )


def checked(name: str, tensor: Tensor) -> Tensor:
    """The tensor of MTP layers; NotFinite, with its name, where it is not finite."""
    plain = tensor.is_floating_point() and tensor.element_size() > 1
    if plain and not bool(tensor.isfinite().all()):
        raise NotFinite(f"the MTP layers' {name} is not finite")
    return tensor


def of_router(name: str, block: str) -> bool:
    """Whether a tensor is of a block, and neither of its experts nor of its shared ones."""
    inside = name.removeprefix(f"{block}.").split(".")[0] if name.startswith(f"{block}.") else None
    return inside not in (None, "experts", "shared_expert_gate", *SHARED_NAMES)
