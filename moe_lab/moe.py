"""MoE layers of a transformers model: finding, computing and editing them.

With `observing.py`, `checkpoint.py` and `saving.py` the only file that knows transformers'
insides. It relies on the contract that the v5 families share: inside a decoder layer stands a
block with a router, which returns (logits, weights, indices), and an experts module decorated
with `use_experts_implementation`, which takes (hidden_states, top_k_index, top_k_weights).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import _default_apply_gate

from moe_lab.depth import drop_decoders
from moe_lab.merging import merge_experts, permutation_name
from moe_lab.stand_ins import OF_PLACING, Placed, place, places_of, shared_places
from moe_lab.types import Edit, LayerInfo, Plan, UserError

COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_FIELDS = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_LAYER_PATH = re.compile(r"^(?P<decoder>.*\.(?P<index>\d+))\.(?P<rest>.+)$")


@dataclass
class MoELayer:
    """One MoE layer of a loaded model: what it is, and the modules that make it up."""

    info: LayerInfo
    decoder: nn.Module
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    shared: nn.Module | None
    shared_gate: nn.Module | None


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model in order; empty where it has none."""
    modules = dict(model.named_modules())
    found = []
    for path, experts in modules.items():
        if not hasattr(type(experts), "_apply_gate") or not hasattr(experts, "has_gate"):
            continue
        block_path = path.rpartition(".")[0]
        match = _LAYER_PATH.match(path)
        if match is None:
            raise UserError(f"experts at {path!r} stand in no numbered decoder layer")
        found.append(_moe_layer(model, modules, block_path, experts, match))
    _set_sizes(model, found)
    return found


def _moe_layer(
    model: nn.Module, modules: dict[str, nn.Module], name: str, experts: nn.Module, match: re.Match
) -> MoELayer:
    block = modules[name]
    children = dict(block.named_children())
    router = children.get("gate", children.get("router"))
    if router is None:
        raise UserError(
            f"{type(block).__name__} at {name!r} has no child named 'gate' or 'router': this "
            "family does not keep the common contract of transformers' MoE layers"
        )
    shared = next((m for n, m in children.items() if n in SHARED_NAMES), None)
    num_rows, num_experts, hidden_size = _experts_shape(experts)
    groups, groups_used = _groups(router, model.config)
    info = LayerInfo(
        index=int(match["index"]),
        name=name,
        num_experts=num_rows,
        top_k=_top_k(router, model.config),
        hidden_size=hidden_size,
        shared=shared is not None,
        groups=groups,
        groups_used=groups_used,
        obstacle=_obstacle(experts, shared),
        shared_width=_width(shared),
        expert_width=_expert_width(experts),
        num_decoders=len(modules[decoders_path(name)]),
        family=getattr(model.config, "model_type", ""),
        real_experts=num_experts if isinstance(experts, Placed) else 0,
    )
    decoder = modules[match["decoder"]]
    gate = children.get("shared_expert_gate")
    return MoELayer(info, decoder, block, router, experts, shared, gate)


def _set_sizes(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Fill in what one expert of each layer and the whole model take, parameters and bytes."""
    parameters = list(model.parameters())
    buffers = [
        buffer
        for module in (model.modules() if layers else ())
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    ]
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *buffers))
    for layer in layers:
        rows = [
            (tensor.numel() // tensor.shape[dimension], tensor)
            for module, key, tensor, dimension in by_expert(layer)
            if key not in module._non_persistent_buffers_set
        ]
        layer.info = replace(
            layer.info,
            expert_parameters=sum(size for size, row in rows if isinstance(row, nn.Parameter)),
            expert_bytes=sum(size * row.element_size() for size, row in rows),
            model_parameters=sum(parameter.numel() for parameter in parameters),
            model_bytes=model_bytes,
        )


SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")


def decoders_path(name: str) -> str:
    """Where the list of decoder layers is in a model, from the path of a module in one of them."""
    return _LAYER_PATH.match(name)["decoder"].rpartition(".")[0]


def hidden_of(output: Any) -> Tensor:
    """What a block or decoder layer computed; some families return a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, tied ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _experts_shape(experts: nn.Module) -> tuple[int, int, int]:
    """Rows of its router, experts that exist, hidden size."""
    down = experts.down_proj  # [E, D, I], or [E, I, D] where transposed
    num_rows = len(experts.place_E) if isinstance(experts, Placed) else down.shape[0]
    return num_rows, down.shape[0], down.shape[2 if experts.is_transposed else 1]


def _expert_width(experts: nn.Module) -> int:
    return experts.down_proj.shape[1 if experts.is_transposed else 2]


def is_gated_mlp(module: nn.Module) -> bool:
    names = {"gate_proj", "up_proj", "down_proj"}
    return {name for name, _ in module.named_children() if name.endswith("proj")} == names


def _width(shared: nn.Module | None) -> int:
    return shared.up_proj.weight.shape[0] if shared is not None and is_gated_mlp(shared) else 0


def _top_k(router: nn.Module, config: object) -> int:
    for holder in (router, config):
        for field in TOP_K_FIELDS:
            if isinstance(getattr(holder, field, None), int):
                return getattr(holder, field)
    raise UserError(f"{type(router).__name__} does not say how many experts a token gets")


def _groups(router: nn.Module, config: object) -> tuple[int, int]:
    if getattr(router, "topk_method", "grouped") == "greedy":
        return 1, 1
    groups = getattr(router, "num_group", getattr(router, "n_group", 1)) or 1
    used = getattr(router, "topk_group", 1) or 1
    return (groups, used) if groups > 1 else (1, 1)


def expert_parameters(experts: nn.Module) -> list[dict[str, Tensor]]:
    """Each existing expert's own weights: a dictionary of slices per expert, without copying."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = {"up": up, "down": "down_proj"}
    if experts.has_bias:
        names |= {"up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}
    slices = {key: getattr(experts, name).unbind(0) for key, name in names.items()}
    return [dict(zip(slices, row, strict=True)) for row in zip(*slices.values(), strict=True)]


def expert_forward(experts: nn.Module, parameters: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """The output [T, D] of one expert, before any router weight."""
    h = expert_hidden(experts, parameters, x_TD)
    y = _linear(h, parameters["down"], parameters.get("down_bias"), experts.is_transposed)
    return experts.post_expert_norm(y) if experts.has_post_expert_norm else y


def expert_hidden(experts: nn.Module, parameters: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """What the hidden units of one expert compute [T, I]: the input of its down projection."""
    h = _linear(x_TD, parameters["up"], parameters.get("up_bias"), experts.is_transposed)
    return experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias


# --------------------------------------------------------------------------- editing


class DenseMLP(nn.Module):
    """A gated dense MLP, down(act(gate(x)) * up(x)), of any width per layer."""

    def __init__(self, hidden_size: int, width: int, activation: nn.Module, **factory: object):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False, **factory)
        self.up_proj = nn.Linear(hidden_size, width, bias=False, **factory)
        self.down_proj = nn.Linear(width, hidden_size, bias=False, **factory)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NoMLP(nn.Module):
    """A block that adds nothing: zeros. `pair`: its decoder layer expects (output, None)."""

    def __init__(self, pair: bool):
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(x)
        return (zeros, None) if self.pair else zeros


@torch.no_grad()
def no_mlp(layer: MoELayer) -> NoMLP:
    """What stands in for a dropped MoE block; what the block returns is found by one token."""
    reference = layer.experts.down_proj
    x_BLD = torch.zeros(
        1, 1, layer.info.hidden_size, dtype=reference.dtype, device=reference.device
    )
    layer.experts.forward = lambda hidden, *routed, **named: torch.zeros_like(hidden)
    try:
        return NoMLP(pair=isinstance(layer.block(x_BLD), tuple))
    finally:
        del layer.experts.forward


def routed_modules(layer: MoELayer) -> list[nn.Module]:
    """The modules of a layer's block that are no part of its shared experts."""
    shared = (*SHARED_NAMES, "shared_expert_gate")
    return [m for name, m in layer.block.named_modules() if name.split(".")[0] not in shared]


def by_expert(layer: MoELayer) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
    """Tensors that are indexed by expert: (module, name in it, tensor, dimension).

    Those of the block outside the shared experts with a dimension of the size of the number of
    experts; the first such dimension is the one. Where the router has more rows than there are
    experts, the experts' own tensors have the latter; what places the rows is not among them.
    """
    inside = set(layer.experts.modules())
    for module in routed_modules(layer):
        size = layer.info.num_experts
        if module in inside:
            size = layer.info.real_experts or size
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and key not in OF_PLACING and size in tensor.shape:
                yield module, key, tensor, tensor.shape.index(size)


def prune_layer(layer: MoELayer, kept: Sequence[int], rows: bool = True) -> None:
    """Keep only the `kept` experts of a layer, in that order, in place.

    rows: whether the router loses the other rows; where not, `stand_ins.place` must say at once
    where they lead.
    """
    old, kept = layer.info.num_experts, list(kept)
    modules = routed_modules(layer) if rows else list(layer.experts.modules())
    for module, key, tensor, dimension in list(by_expert(layer)):
        if module not in modules:
            continue
        index = torch.tensor(kept, device=tensor.device)
        cut = tensor.detach().index_select(dimension, index)
        if isinstance(tensor, nn.Parameter):
            cut = nn.Parameter(cut, tensor.requires_grad)
        setattr(module, key, cut)
    for module in modules:
        for key, value in vars(module).items():
            if "expert" in key and type(value) is int and value == old:
                setattr(module, key, len(kept))


@torch.no_grad()
def keep_experts(layer: MoELayer, edit: Edit, tensors: Mapping[str, Tensor]) -> None:
    """The structure of a prune or merge edit: the kept experts stay, with or without all rows."""
    num_rows, kept = layer.info.num_experts, edit.kept
    if not edit.keeps_rows or len(kept) == num_rows:
        prune_layer(layer, kept)
        return
    prune_layer(layer, kept, rows=False)
    if edit.router == "all":
        place(layer.experts, shared_places(edit.groups, num_rows))
        return
    constants = _constants(layer, edit, tensors) if edit.replacement == "constant" else None
    place(layer.experts, places_of(kept, num_rows), edit.replacement, constants)


def _constants(layer: MoELayer, edit: Edit, tensors: Mapping[str, Tensor]) -> Tensor:
    """The constants [R, D] of an edit, in ascending order of the experts that they stand for."""
    reference, name = layer.experts.down_proj, constants_name(edit.index)
    shape = layer.info.num_experts - len(edit.kept), layer.info.hidden_size
    if reference.is_meta:
        return reference.new_empty(shape)
    found = tuple(tensors[name].shape) if name in tensors else None
    if found != shape:
        raise UserError(
            f"the plan replaces experts of layer {edit.index} by constants: its tensor {name} must "
            f"have the shape {shape}, and "
            + (f"has {found}" if found else "is missing (plan.safetensors lies beside plan.json)")
        )
    return tensors[name].to(reference)


def constants_name(index: int) -> str:
    """What a plan calls the constants of decoder layer `index` among its tensors."""
    return f"layers.{index}.constants"


@torch.no_grad()
def merge_layer(layer: MoELayer, edit: Edit, tensors: Mapping[str, Tensor]) -> None:
    """Carry out a merge edit: average each group into the expert that stays; the others go.

    tensors: has the permutation [E, I] of `merge_experts` where the edit's alignment was found
    from activations. M-SMoE (2310.01334) and HC-SMoE (2410.08589) let all router rows live on and
    lead to the merged experts (`router` all). A stock model cannot send two rows to one expert:
    there a group keeps one, that of the expert that stays (dominant), or the weighted mean (mean)
    or plain sum (sum) of the group's rows, with its entries of the router's biases alike.
    """
    permutation_EI = tensors.get(permutation_name(edit.index))
    merge_experts(layer.experts, edit.kept, edit.groups, edit.weights, edit.align, permutation_EI)
    for module, _, tensor, dimension in by_expert(layer) if edit.router in ("mean", "sum") else ():
        if module is layer.experts:
            continue
        rows = tensor.movedim(dimension, 0)
        found = []
        for members, shares in zip(edit.groups, edit.weights, strict=True):
            factor = rows.new_tensor(shares, dtype=torch.float64)
            factor = torch.ones_like(factor) if edit.router == "sum" else factor
            found.append(torch.einsum("g,g...->...", factor, rows[list(members)].double()))
        rows[list(edit.kept)] = torch.stack(found).to(rows.dtype)
    keep_experts(layer, edit, tensors)


def _obstacle(experts: nn.Module, shared: nn.Module | None) -> str | None:
    if isinstance(experts, Placed):
        return "its router has more rows than there are experts"
    if shared is not None and not is_gated_mlp(shared):
        return "its shared expert is no gated MLP of the usual three projections"
    if not experts.has_gate:
        return "its experts have no gate projection"
    if experts.has_bias:
        return "its experts have biases"
    if experts.is_transposed or not experts.is_concatenated:
        return "its experts store their weights transposed or interleaved"
    if experts.has_post_expert_norm:
        return "its experts end in a norm"
    if type(experts)._apply_gate is not _default_apply_gate:
        return "its experts do not compute act(gate) * up"
    return None


@torch.no_grad()
def check_is_sum(layer: MoELayer) -> None:
    """Refuse a block that is not shared(x) + sum_k weight_k * E_k(x), by trying it on 8 tokens.

    Some families scale or average the sum afterwards; condensing would forget that.
    """
    reference = layer.experts.down_proj
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(8, layer.info.hidden_size, generator=generator).to(reference)
    _, weight_TK, index_TK = layer.router(x_TD)
    parameters = expert_parameters(layer.experts)
    expected = torch.zeros_like(x_TD)
    for token, (weights, indices) in enumerate(zip(weight_TK, index_TK.tolist(), strict=True)):
        for weight, expert in zip(weights, indices, strict=True):
            y_D = expert_forward(layer.experts, parameters[expert], x_TD[token : token + 1])[0]
            expected[token] += weight * y_D
    if layer.shared is not None:
        gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x_TD).sigmoid()
        expected += gate * layer.shared(x_TD)
    found = hidden_of(layer.block(x_TD[None]))[0]
    scale = expected.abs().max()
    if (found - expected).abs().max() > 0.02 * scale:
        raise UserError(
            f"{type(layer.block).__name__} does more than add its shared and routed experts: this "
            "family cannot be condensed yet"
        )


def part_widths(info: LayerInfo, experts: Sequence[int]) -> tuple[int, ...]:
    """Hidden units of each part of the layer condensed to `experts`, in `condensed`'s order."""
    return ((info.shared_width,) if info.shared else ()) + (info.expert_width,) * len(experts)


def condensed(
    layer: MoELayer, experts: Sequence[int], gates: Sequence[float], shared_gate: float
) -> DenseMLP:
    """The layer as one dense MLP: shared_gate * shared(x) + sum_i gates[i] * E_experts[i](x).

    CD-MoE (2412.00069 section 3): rows of the shared and the chosen experts are concatenated and
    each constant gate is folded into its columns of the down projection.
    """
    gate, up, down = [], [], []
    if layer.shared is not None:
        gate.append(layer.shared.gate_proj.weight)
        up.append(layer.shared.up_proj.weight)
        down.append(layer.shared.down_proj.weight * shared_gate)
    for expert, weight in zip(experts, gates, strict=True):
        gate_part, up_part = layer.experts.gate_up_proj[expert].chunk(2)
        gate.append(gate_part)
        up.append(up_part)
        down.append(layer.experts.down_proj[expert] * weight)
    if not gate:
        raise UserError(
            f"{layer.info.name} has no shared expert: a condensed layer without routed experts "
            "would be empty; ask for condense.num_routed of at least 1"
        )
    width = sum(part.shape[0] for part in gate)
    reference = gate[0]
    dense = DenseMLP(
        layer.info.hidden_size, width, layer.experts.act_fn, device="meta", dtype=reference.dtype
    )
    weights = (torch.cat(gate), torch.cat(up), torch.cat(down, dim=1))
    for linear, weight in zip(
        (dense.gate_proj, dense.up_proj, dense.down_proj), weights, strict=True
    ):
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return dense


def set_block(model: nn.Module, name: str, block: nn.Module) -> nn.Module:
    """Put `block` at the path `name` of a model; returns what stood there."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    previous = getattr(holder, child)
    setattr(holder, child, block)
    return previous


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Carry out a plan on a loaded model, in place; condensed layers become `DenseMLP`s.

    The model computes the edited function at once; `saving.save` finds the form in which
    stock transformers can hold it. Decoder layers behind a dropped one get new numbers.
    """
    layers = {layer.info.index: layer for layer in moe_layers(model)}
    for edit in plan.edited():
        if edit.index not in layers:
            raise UserError(
                f"the plan edits layer {edit.index}, which is no MoE layer of this model; its MoE "
                f"layers are {sorted(layers)}"
            )
        _apply(model, layers[edit.index], edit, plan.tensors)
    dropped = {edit.index: edit for edit in plan.edited() if edit.edit == "drop_block"}
    if dropped:
        name = next(iter(dropped.values())).name
        drop_decoders(model, decoders_path(name), dropped)


def _apply(model: nn.Module, layer: MoELayer, edit: Edit, tensors: Mapping[str, Tensor]) -> None:
    if edit.edit in ("prune", "merge"):
        _edit_experts(layer, edit, tensors)
    elif edit.edit == "condense":
        dense = condensed(layer, edit.experts, edit.gates, edit.shared_gate)
        set_block(model, layer.info.name, dense)
    elif edit.edit == "drop_layer":
        set_block(model, layer.info.name, no_mlp(layer))


def _edit_experts(layer: MoELayer, edit: Edit, tensors: Mapping[str, Tensor]) -> None:
    check_own_rows(layer.info)
    if edit.edit == "prune":
        keep_experts(layer, edit, tensors)
    elif edit.edit == "merge":
        merge_layer(layer, edit, tensors)
    else:
        raise ValueError(f"{edit.edit} does not edit the experts of a layer")


@torch.no_grad()
def edited_block(
    layer: MoELayer, edit: Edit, tensors: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of the layer's block with one prune or merge edit carried out; the layer stays.

    tensors: the plan's own, by name, where the edit needs some (`Plan.tensors`). The copy shares
    the model's config, so that it computes its experts as the model does, and has no hooks.
    """
    config = layer.experts.config
    block = copy.deepcopy(layer.block, {id(config): config})
    for module in block.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    copied = dict(zip(layer.block.modules(), block.modules(), strict=True))
    parts = ("block", "router", "experts", "shared", "shared_gate")
    found = {name: copied.get(getattr(layer, name)) for name in parts}
    _edit_experts(replace(layer, **found), edit, tensors or {})
    return block


def check_kept(info: LayerInfo, num_kept: int, keeps_rows: bool = False) -> None:
    """Refuse a number of kept experts with which the layer's router cannot work.

    keeps_rows: whether the router keeps all its rows, so that any number will do but none. Raises
    UserError also for layers whose router has kept them before.
    """
    check_own_rows(info)
    asked = f"layer {info.index}: {num_kept} of {info.num_experts} experts would stay"
    if keeps_rows and num_kept:
        return
    if num_kept < info.top_k:
        raise UserError(f"{asked}, but its router chooses {info.top_k} for each token (top-k)")
    per_group = num_kept // info.groups
    if info.groups > 1 and (
        num_kept % info.groups or per_group < 2 or info.groups_used * per_group < info.top_k
    ):
        raise UserError(
            f"{asked}, but its router works on {info.groups} groups and uses {info.groups_used}: "
            f"each group must keep the same number, at least 2, and together at least {info.top_k}"
        )


def check_own_rows(info: LayerInfo) -> None:
    """Refuse a layer in which not every router row has an expert of its own."""
    if info.real_experts:
        raise UserError(
            f"layer {info.index}: its {info.num_experts} router rows lead to {info.real_experts} "
            "experts, so that it cannot be pruned or merged once more: compress the model that it "
            "comes from, or make it with method.replacement=nothing (a merge: with "
            "method.router=dominant)"
        )
