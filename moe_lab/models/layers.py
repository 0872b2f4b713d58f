"""MoE layers of a transformers model: finding and computing them.

With `routers.py`, `observing.py`, `remapped.py`, `checkpoint.py`, `layerwise.py` and `saving.py`
all that knows transformers' insides. It relies on the contract that the v5 families share: inside a
decoder layer stands a block with a router, which returns (logits, weights, indices), and an experts
module decorated with `use_experts_implementation`, which takes (hidden_states, top_k_index,
top_k_weights). Families that keep another contract have an adapter (`adapters/`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.adapters.base import AdaptedExperts, adapt
from moe_lab.models.experts import Experts, OneExpert
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.opening import text_config
from moe_lab.models.remapped import OF_REMAPPING, RemappedExperts
from moe_lab.models.widths import is_uneven, num_zeros
from moe_lab.types import LayerInfo, UserError

COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
Output = Tensor | tuple[Tensor, ...]  # of a block or a decoder layer
TOP_K_FIELDS = (
    *("top_k", "num_experts_per_tok", "num_experts_per_token"),
    *("moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
)
_LAYER_PATH = re.compile(r"^(?P<decoder>.*\.\d+)(\.|$)")


@dataclass
class MoELayer:
    """One MoE layer of a loaded model: what it is, and the modules that make it up.

    block: what holds router and experts; the decoder layer itself where they stand in it (gemma4).
    """

    info: LayerInfo
    decoder: nn.Module
    block: nn.Module
    router: nn.Module
    experts: Experts
    shared: nn.Module | None
    shared_gate: nn.Module | None

    @property
    def has_block(self) -> bool:
        """Whether router and experts have a block of their own in the decoder layer."""
        return self.block is not self.decoder


Standing = MoELayer | nn.Module  # at a layer: a plain block where it is no MoE layer any more


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The MoE layers of a model in order; empty where it has none."""
    adapt(model)
    modules = dict(model.named_modules())
    layers: dict[str, MoELayer] = {}
    for path, experts in modules.items():
        if not _are_experts(experts) or not _in_text_model(model, path):
            continue
        block_path = path.rpartition(".")[0]
        decoder = decoder_path(path)
        if decoder in layers:
            raise UserError(
                f"{type(model).__name__} has two MoE blocks in one decoder layer, "
                f"{layers[decoder].info.name!r} and {block_path!r} (of text and of images?), "
                "with one count of experts for both: they cannot be edited each by itself"
            )
        layers[decoder] = _moe_layer(model, modules, block_path, experts, decoder)
    found = list(layers.values())
    _set_sizes(model, found)
    return found


def standing_at(model: PreTrainedModel, name: str) -> Standing:
    """What stands at the path of an MoE block: the layer, or the block that took its place."""
    layers = {layer.info.name: layer for layer in moe_layers(model)}
    return layers[name] if name in layers else model.get_submodule(name)


def _in_text_model(model: PreTrainedModel, path: str) -> bool:
    """Whether a module belongs to the text model: a tower for images may have experts, too."""
    text = text_config(model.config)
    if text is model.config:
        return True
    owner, parts = model, path.split(".")
    for end in range(len(parts)):
        part = model.get_submodule(".".join(parts[:end]))
        owner = part if isinstance(part, PreTrainedModel) else owner
    return bool(owner.config.model_type == text.model_type)


def _are_experts(module: nn.Module) -> TypeGuard[Experts]:
    contract = hasattr(type(module), "_apply_gate") and hasattr(module, "has_gate")
    return contract and not isinstance(module, OneExpert)


def _moe_layer(
    model: PreTrainedModel,
    modules: dict[str, nn.Module],
    name: str,
    experts: Experts,
    decoder_path: str,
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
    num_rows, num_experts = _experts_shape(experts)
    config = text_config(model.config)
    groups, groups_used = _groups(router, config)
    info = LayerInfo(
        index=layer_index(decoder_path),
        name=name,
        num_experts=num_rows,
        top_k=_top_k(router, config),
        hidden_size=_hidden_size(config, experts),
        shared=shared is not None and num_parameters(shared) > 0,  # of `superset.py`: 0
        groups=groups,
        groups_used=groups_used,
        obstacle=_obstacle(experts),
        shared_width=_width(shared),
        expert_width=_expert_width(experts),
        num_decoders=len(module_list(model, decoders_path(name))),
        family=getattr(model.config, "model_type", ""),
        real_experts=num_experts if isinstance(experts, RemappedExperts) else 0,
        zero_experts=getattr(experts, "zero_experts", 0),
    )
    decoder = modules[decoder_path]
    gate = children.get("shared_expert_gate")
    return MoELayer(info, decoder, block, router, experts, shared, gate)


def _set_sizes(model: PreTrainedModel, layers: Sequence[MoELayer]) -> None:
    """Fill in what one expert of each layer and the whole model take, parameters and bytes."""
    parameters = list(model.parameters())
    buffers = [
        buffer
        for module in (model.modules() if layers else ())
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    ]
    number = sum(parameter.numel() for parameter in parameters)
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *buffers))
    zeros, zero_bytes = num_zeros(model)
    for layer in layers:
        rows = [
            (tensor.narrow(dimension, 0, num_rows_each(layer, tensor, dimension)).numel(), tensor)
            for module, key, tensor, dimension in by_expert(layer)
            if key not in module._non_persistent_buffers_set
        ]
        neuron, shared = _neuron_sizes(layer), _shared_neuron_sizes(layer)
        fewer, fewer_bytes = (part // len(layer.experts.down_proj) for part in _zeros(layer))
        layer.info = replace(
            layer.info,
            expert_parameters=sum(n for n, row in rows if isinstance(row, nn.Parameter)) - fewer,
            expert_bytes=sum(size * row.element_size() for size, row in rows) - fewer_bytes,
            model_parameters=number - zeros,
            model_bytes=model_bytes - zero_bytes,
            neuron_parameters=neuron[0],
            neuron_bytes=neuron[1],
            shared_neuron_parameters=shared[0],
            shared_neuron_bytes=shared[1],
        )


def _zeros(layer: MoELayer) -> tuple[int, int]:
    """Of its experts: see `widths.num_zeros`."""
    return num_zeros(layer.experts) if is_uneven(layer.experts) else (0, 0)


def _neuron_sizes(layer: MoELayer) -> tuple[int, int]:
    """What one hidden unit of an expert takes: parameters and bytes."""
    units = HiddenUnits(layer.experts)
    number = max(1, len(layer.experts.down_proj) * units.width)
    return _sizes_of([units.tensors[name] for name in units.places], number)


def _shared_neuron_sizes(layer: MoELayer) -> tuple[int, int]:
    """The same of the shared experts; 0 where it is not known what they are made of."""
    known = layer.shared is not None and has_hidden_units(layer.shared)
    if layer.shared is None or not known or not layer.info.shared_width:
        return 0, 0
    weights = [m.weight for m in layer.shared.children() if isinstance(m, nn.Linear)]
    return _sizes_of(weights, layer.info.shared_width)


def _sizes_of(tensors: Sequence[Tensor], number: int) -> tuple[int, int]:
    """What each of `number` parts of all these tensors takes: parameters and bytes."""
    parts = [(tensor.numel() // number, tensor.element_size()) for tensor in tensors]
    return sum(size for size, _ in parts), sum(size * each for size, each in parts)


def has_hidden_units(shared: nn.Module) -> bool:
    """Whether it is known where the hidden units of shared experts lie: in a gated or plain MLP."""
    linears = {n for n, m in shared.named_children() if isinstance(m, nn.Linear)}
    return linears in ({"gate_proj", "up_proj", "down_proj"}, {"up_proj", "down_proj"})


SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")


def layer_index(name: str) -> int:
    """The decoder layer in the path of one of its modules."""
    return int(next(part for part in reversed(name.split(".")) if part.isdigit()))


def decoders_path(name: str) -> str:
    """Where the list of decoder layers is in a model, from the path of a module in one of them."""
    return decoder_path(name).rpartition(".")[0]


def decoder_path(name: str) -> str:
    """The path of the decoder layer in which a module is."""
    match = _LAYER_PATH.match(name)
    if match is None:
        raise UserError(f"experts at {name!r} stand in no numbered decoder layer")
    return match["decoder"]


def module_list(model: nn.Module, path: str) -> nn.ModuleList:
    """The list of modules at a path in a model."""
    return cast(nn.ModuleList, model.get_submodule(path))


def hidden_of(output: Output) -> Tensor:
    """What a block or decoder layer computed; some families return a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, tied ones counted once; not the zeros of `widths.py`."""
    return sum(parameter.numel() for parameter in module.parameters()) - num_zeros(module)[0]


def _experts_shape(experts: Experts) -> tuple[int, int]:
    """Rows of its router, experts that exist."""
    number = experts.down_proj.shape[0]
    return len(experts.place_E) if isinstance(experts, RemappedExperts) else number, number


def _hidden_size(config: object, experts: Experts) -> int:
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) else experts_size(experts)


def experts_size(experts: Experts) -> int:
    """Length of what an expert gets and gives: the hidden size but where experts are latent."""
    return experts.down_proj.shape[2 if experts.is_transposed else 1]


def _expert_width(experts: Experts) -> int:
    return experts.down_proj.shape[1 if experts.is_transposed else 2]


def is_gated_mlp(module: nn.Module) -> bool:
    names = {"gate_proj", "up_proj", "down_proj"}
    return {name for name, _ in module.named_children() if name.endswith("proj")} == names


def _width(shared: nn.Module | None) -> int:
    if shared is None or not (is_gated_mlp(shared) or has_hidden_units(shared)):
        return 0
    return shared.get_parameter("up_proj.weight").shape[0]


def _top_k(router: nn.Module, config: object) -> int:
    for holder in (router, config):
        for field in TOP_K_FIELDS:
            if isinstance(number := getattr(holder, field, None), int):
                return number
    raise UserError(f"{type(router).__name__} does not say how many experts a token gets")


def _groups(router: nn.Module, config: object) -> tuple[int, int]:
    if getattr(router, "topk_method", "grouped") == "greedy":
        return 1, 1
    groups = getattr(router, "num_group", getattr(router, "n_group", 1)) or 1
    used = getattr(router, "topk_group", 1) or 1
    return (groups, used) if groups > 1 else (1, 1)


def routed_modules(layer: MoELayer) -> list[nn.Module]:
    """The modules of a layer's block that are no part of its shared experts."""
    if not layer.has_block:
        return [*layer.router.modules(), *layer.experts.modules()]
    shared = (*SHARED_NAMES, "shared_expert_gate")
    return [m for name, m in layer.block.named_modules() if name.split(".")[0] not in shared]


def by_expert(layer: MoELayer) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
    """Tensors that are indexed by expert: (module, name in it, tensor, dimension).

    Those of the block outside the shared experts with a dimension of the size of the number of
    experts; the first such dimension is the one. Where the router has more rows than there are
    experts, the experts' own tensors have the latter; what places the rows is not among them. Of
    tensors with `further_rows` behind those of the experts, these are no expert's. Outside router
    and experts the block's own tensors count, and of what stands in it only vectors: a projection
    may be as wide by chance.
    """
    inside, more = set(layer.experts.modules()), further_rows(layer)
    of_router = set(layer.router.modules())
    also = getattr(layer.experts, "indexed_size", None)
    for module in routed_modules(layer):
        size = layer.info.num_experts
        if module in inside:
            size = layer.info.real_experts or size
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or key in OF_REMAPPING:
                continue
            known = module in inside or module in of_router or module is layer.block
            if not known and tensor.numel() != max(tensor.shape, default=0):
                continue
            sizes = {size, also} if module in inside or not more else {size, size + more}
            for dimension, length in enumerate(tensor.shape):
                if length in sizes:
                    yield module, key, tensor, dimension
                    break


def further_rows(layer: MoELayer) -> int:
    """Rows of the router behind those of the routed experts: of shared ones, or of none at all."""
    numbers = {
        value
        for module in layer.router.modules()
        for key, value in vars(module).items()
        if _counts_rows(key) and type(value) is int and value > layer.info.num_experts
    }
    shapes = {size for tensor in layer.router.state_dict().values() for size in tensor.shape}
    return min(numbers & shapes, default=layer.info.num_experts) - layer.info.num_experts


def _counts_rows(name: str) -> bool:
    return ("expert" in name or "classes" in name) and name not in TOP_K_FIELDS


def rows_of(layer: MoELayer, tensor: Tensor, dimension: int, experts: Sequence[int]) -> list[int]:
    """Where these experts, and what is never removed, are in a dimension that `by_expert` says."""
    length = tensor.shape[dimension]
    if isinstance(layer.experts, AdaptedExperts):
        return layer.experts.places(length, experts)
    return [*experts, *range(layer.info.real_experts or layer.info.num_experts, length)]


def num_rows_each(layer: MoELayer, tensor: Tensor, dimension: int) -> int:
    """How many rows of a dimension that `by_expert` says each expert has."""
    one, none = (rows_of(layer, tensor, dimension, experts) for experts in ([0], []))
    return len(one) - len(none)


def counts_of(layer: MoELayer) -> list[tuple[nn.Module, str, int]]:
    """Where routed modules say their number of experts, or of rows: (module, name, the number)."""
    numbers = (layer.info.num_experts, layer.info.num_experts + further_rows(layer))
    return [
        (module, key, value)
        for module in routed_modules(layer)
        for key, value in vars(module).items()
        if _counts_rows(key) and type(value) is int and value in numbers
    ]


def _obstacle(experts: Experts) -> str | None:
    if isinstance(experts, AdaptedExperts) and experts.obstacle:
        return experts.obstacle
    if isinstance(experts, RemappedExperts):
        return "its router has more rows than there are experts"
    if experts.has_post_expert_norm:
        return "each of its experts ends in a norm, so that several are no wider one"
    return None


def check_kept(info: LayerInfo, num_kept: int, keeps_rows: bool = False) -> None:
    """Refuse a number of kept experts with which the layer's router cannot work.

    keeps_rows: whether the router keeps all its rows, so that any number will do but none. Raises
    UserError also for layers whose router has kept them before.
    """
    check_own_rows(info)
    asked = f"layer {info.index}: {num_kept} of {info.num_experts} {info.items} would stay"
    if (keeps_rows or info.items != "experts") and num_kept:
        return
    if info.items != "experts":
        raise UserError(f"{asked}, and at least one has to")
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
