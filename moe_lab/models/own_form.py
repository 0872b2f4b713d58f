"""moe_lab's own form: layer structures that no family can say.

Written by `own_config`, and replayed by `apply_structure` on the model before its weights come in;
docs/form.md describes it for other readers, `own_config.py` has its file. How many experts and
router rows a layer has, how wide experts and dense blocks are and how many experts a token gets is
said here, whatever edit left it so; under "own" stands what kinds of edits say themselves
(`Edit.written`), by kind.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_lab.models.condensing import one_wide_expert, set_width, width_of
from moe_lab.models.editing import DenseMLP, no_mlp, prune_layer, set_block
from moe_lab.models.edits.plan import known_kinds
from moe_lab.models.experts import OneExpert
from moe_lab.models.layers import (
    MoELayer,
    experts_size,
    layer_index,
    moe_layers,
    standing_at,
)
from moe_lab.models.narrowing import fit_implementation, narrow_shared
from moe_lab.models.opening import empty_model
from moe_lab.models.own_config import lowest_version, without_structures
from moe_lab.models.remapped import RemappedExperts, remap
from moe_lab.models.routers import set_top_k_of
from moe_lab.models.widths import is_uneven, set_widths, widths_of
from moe_lab.types import LayerInfo, UserError

DIFFERING = ("expert_width", "shared_width", "top_k")  # of a layer's LayerInfo


def apply_structure(model: PreTrainedModel, structure: dict[str, Any]) -> None:
    """Give a model without weights the layers that `config.moe_lab` lists; idempotent."""
    layers = {str(layer.info.index): layer for layer in moe_layers(model)}
    for index, wanted in structure["layers"].items():
        layer = layers.get(index)
        if layer is None:
            continue
        wanted = dict(wanted)
        own = wanted.pop("own", {})
        if "width" in wanted:
            set_block(model, layer.info.name, _dense(layer, **wanted))
        elif wanted and not layer.info.real_experts:
            _keep(layer, **wanted)
        for kind, written in own.items():
            _replay(model, layer.info, kind, written)
    fit_implementation(model)


def _dense(
    layer: MoELayer, width: int, in_place: bool = False, num_routed: int | None = None
) -> nn.Module:
    """The dense block of this width in the place of a layer, its weights still to come."""
    if not width:
        return no_mlp(layer)
    if in_place:
        if num_routed is not None and num_routed < layer.info.num_experts:
            prune_layer(layer, range(num_routed))
            layer = replace(layer, info=replace(layer.info, num_experts=num_routed))
        return one_wide_expert(layer, width)
    return DenseMLP(layer.info.hidden_size, width, layer.experts.act_fn)


def _replay(model: PreTrainedModel, info: LayerInfo, name: str, written: dict[str, Any]) -> None:
    """Build what a kind of edits wrote down itself, unless it stands there already."""
    kind = known_kinds().get(name)
    if kind is None:
        raise UserError(
            f"layer {info.index} of this checkpoint has a structure of the edit {name!r}, which is "
            f"not known; known are {', '.join(sorted(known_kinds()))}. Import the module that "
            "defines it before the checkpoint is loaded"
        )
    standing = standing_at(model, info.name)
    if kind.written(standing) != written:
        set_block(model, info.name, kind.replay(standing, written))


def _keep(
    layer: MoELayer,
    num_experts: int,
    rows: int | None = None,
    stand_in: str | None = None,
    expert_width: int | None = None,
    top_k: int | None = None,
    expert_widths: list[int] | None = None,
    shared_width: int | None = None,
) -> None:
    """Leave so many experts and router rows; where the rows lead comes in with the weights."""
    rows = rows or num_experts
    if expert_widths is not None:
        set_widths(layer.experts, ())
        expert_width = max(expert_widths)
    if shared_width not in (None, layer.info.shared_width):
        narrow_shared(layer, range(shared_width))
    if expert_width not in (None, layer.info.expert_width):
        set_width(layer, expert_width)
    if top_k not in (None, layer.info.top_k):
        set_top_k_of(layer, top_k)
    if rows < layer.info.num_experts:
        prune_layer(layer, range(rows))
        layer = replace(layer, info=replace(layer.info, num_experts=rows))
    if rows > num_experts:
        prune_layer(layer, range(num_experts), rows=False)
        like = layer.experts.down_proj
        constants = like.new_empty(rows - num_experts, experts_size(layer.experts))
        is_constant = stand_in == "constant"
        remap(layer.experts, range(rows), stand_in, constants if is_constant else None)
    set_widths(layer.experts, expert_widths or ())


def own_config(
    model: PreTrainedModel, layers: list[MoELayer], edited: dict[str, nn.Module], padding: float
) -> Any:
    """A model's config that lists its layers' structures; edited: its dense blocks, by path."""
    config = copy.deepcopy(model.config)
    differing = differing_layers(model.config, layers)
    structure = {
        str(one.info.index): _experts_structure(one, differing[one.info.index]) for one in layers
    }
    structure |= {str(layer_index(name)): _dense_structure(b) for name, b in edited.items()}
    for index, own in own_structures(model, layers).items():
        structure[str(index)] = structure.get(str(index), {}) | {"own": own}
    version = lowest_version(structure)
    config.moe_lab = {"version": version, "padding": padding, "layers": structure}
    return config


def differing_layers(config: Any, layers: list[MoELayer]) -> dict[int, dict[str, int]]:
    """By index the widths and top_k of these layers where a family has others by its config.

    config: it may have structures of ours, which do not count.
    """
    plain = empty_model(without_structures(config))
    built = {layer.info.index: layer.info for layer in moe_layers(plain)}
    return {
        layer.info.index: {
            name: getattr(layer.info, name)
            for name in DIFFERING
            if getattr(layer.info, name) != getattr(built.get(layer.info.index), name, None)
        }
        for layer in layers
    }


def own_structures(model: nn.Module, layers: list[MoELayer]) -> dict[int, dict[str, Any]]:
    """What kinds of edits say of a model's layers themselves: by index, then by kind."""
    by_name = {layer.info.name: layer for layer in layers}
    kinds, found = known_kinds().items(), dict[int, dict[str, Any]]()
    for path, module in model.named_modules():
        standing = by_name.get(path, module)
        written = {name: kind.written(standing) for name, kind in kinds}
        if own := {name: said for name, said in written.items() if said is not None}:
            found[layer_index(path)] = own
    return found


def _dense_structure(block: nn.Module) -> dict[str, Any]:
    structure: dict[str, Any] = {"width": width_of(block)}
    for part in block.children():
        if isinstance(part, OneExpert):
            structure |= {"in_place": True, "num_routed": part.num_routed}
    return structure


def _experts_structure(layer: MoELayer, differing: dict[str, int]) -> dict[str, Any]:
    structure: dict[str, Any] = {"num_experts": layer.info.num_experts}
    if isinstance(layer.experts, RemappedExperts):
        structure = {"num_experts": layer.info.real_experts, "rows": layer.info.num_experts}
        if layer.experts.stand_in:
            structure["stand_in"] = layer.experts.stand_in
    if is_uneven(layer.experts):
        structure["expert_widths"] = list(widths_of(layer.experts))
        differing = {name: value for name, value in differing.items() if name != "expert_width"}
    return structure | differing
