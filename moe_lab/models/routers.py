"""What routers do, and changing it: how many experts a token gets, and among which they choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from moe_lab.models.hashed import is_hashed
from moe_lab.models.layers import (
    TOP_K_FIELDS,
    MoELayer,
    by_expert,
    counts_of,
    further_rows,
    moe_layers,
    routed_modules,
    rows_of,
)
from moe_lab.models.opening import text_config
from moe_lab.models.probing import probe, route, skeleton
from moe_lab.models.skipping import none_skipped
from moe_lab.types import UserError


def _softmax(logits_TE: Tensor) -> Tensor:
    """Over a short last dimension it takes several times as long as over the first one."""
    if logits_TE.shape[-1] < 128:
        return logits_TE.T.contiguous().softmax(dim=0).T
    return logits_TE.softmax(dim=-1)


SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {  # of logits [T, E]
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


@torch.no_grad()
def scoring(layer: MoELayer) -> str | None:
    """Which of SCORINGS makes a layer's router weights from its logits; None where none does.

    Found by giving the router random tokens, since no config field says it in all families. With
    one expert for each token a renormalised weight is always 1 and says nothing: then two are
    asked for while looking.
    """
    if layer.info.num_experts == 1:
        return "softmax"
    before = [place for place in top_k_places(layer.router.modules()) if place[2] == 1]
    for module, field, _ in before:
        setattr(module, field, 2)
    try:
        with none_skipped(layer.router):
            logits_TE, weight_TK, index_TK = route(layer, probe(layer))
    finally:
        for module, field, value in before:
            setattr(module, field, value)
    found = matching_scoring(logits_TE, index_TK, weight_TK)
    # Over the experts alone it is no probability where further rows have their share of it.
    return None if found == "softmax" and further_rows(layer) else found


def matching_scoring(logits_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> str | None:
    """Which of SCORINGS gives these weights, up to one factor per token.

    The weights of the chosen experts are proportional to softmax(logits) also where they are
    renormalised, scaled, or a softmax over the chosen logits alone. Of several, a weight of 0 is of
    an expert that a rule left out (`skipping.py`), and says nothing.
    """
    weight = weight_TK.double()
    for name, score in SCORINGS.items():
        chosen = score(logits_TE.double()).gather(1, index_TK.clamp(max=logits_TE.shape[1] - 1))
        if weight.shape[1] == 1:  # one expert: the factor must be the same for all tokens
            ratio = weight / chosen
            spread = (ratio / ratio[:1] - 1).abs().amax()
        else:
            chosen = chosen.where(weight > 0, 0.0)
            shares = chosen / chosen.sum(dim=1, keepdim=True)
            spread = (weight / weight.sum(dim=1, keepdim=True) - shares).abs().amax()
        if spread < (1e-4 if weight_TK.dtype in (torch.float32, torch.float64) else 2e-2):
            return name
    return None


def top_k_places(holders: Iterable[Any]) -> list[tuple[Any, str, int]]:
    """Where modules or a config say how many experts a token gets: (holder, field, number)."""
    return [
        (holder, field, getattr(holder, field))
        for holder in holders
        for field in TOP_K_FIELDS
        if type(getattr(holder, field, None)) is int
    ]


def with_twins(num_experts: int, size: int) -> list[int]:
    """The experts of a layer and, behind them, enough of them a second time to be `size`."""
    return [number % num_experts for number in range(size)]


@torch.no_grad()
def takes_twins(layer: MoELayer) -> bool:
    """Whether repeating experts, router rows and all, leaves the layer's function as it is.

    It does where a token gets one expert, whose weight does not depend on what the others score:
    either twin computes the same. Tried on random tokens.
    """
    if layer.info.top_k != 1 or layer.info.groups > 1:
        return False
    _, weight, index = route(layer, probe(layer))
    twins = with_twins(layer.info.num_experts, layer.info.num_experts + 1)
    with restricted_layer(layer, twins):
        _, other_weight, other_index = route(layer, probe(layer))
    return torch.equal(index, other_index) and torch.allclose(weight, other_weight, rtol=1e-5)


def set_top_k(model: PreTrainedModel, top_k: int) -> None:
    """Make every router of a model choose `top_k` experts per token, and its config say so.

    The model may be on the meta device. Raises UserError, and changes nothing, where a layer has
    fewer experts or the family's routers do not obey.
    """
    layers = moe_layers(model)
    for layer in layers:
        if not 1 <= top_k <= layer.info.num_experts:
            raise UserError(
                f"top_k={top_k}: layer {layer.info.index} has {layer.info.num_experts} experts, so "
                f"that a token can get 1 to {layer.info.num_experts} of them"
            )
        if why := getattr(layer.experts, "keeps_top_k", None):
            raise UserError(f"top_k={top_k}: {why}")
    config, before = text_config(model.config), _every_place(model)
    for holder, field, _ in before:
        setattr(holder, field, top_k)
    try:
        numbers = {chosen_by(layer) for layer in layers}
    except (RuntimeError, ValueError, IndexError):  # of routers that cannot choose so many
        numbers = {0}
    if numbers != {top_k}:
        for holder, field, value in before:
            setattr(holder, field, value)
        raise UserError(
            f"top_k={top_k}: routers of the family {config.model_type!r} choose "
            f"{chosen_by(layers[0])} experts for each token whatever their config says"
        )


def _every_place(model: PreTrainedModel) -> list[tuple[Any, str, int]]:
    """Where a model and its config say how many experts a token gets."""
    config = text_config(model.config)
    parts = [getattr(config, name) for name in config.sub_configs]
    modules = (module for layer in moe_layers(model) for module in routed_modules(layer))
    return top_k_places([config, *parts, *modules])


def set_top_k_of(layer: MoELayer, top_k: int) -> None:
    """Make the router of one layer choose `top_k` experts per token; UserError where it does not.

    The layer may be on the meta device.
    """
    for holder, field, _ in top_k_places(routed_modules(layer)):
        setattr(holder, field, top_k)
    if (chosen := chosen_by(layer)) != top_k:
        raise UserError(
            f"layer {layer.info.index}: its router chooses {chosen} experts for each token, and "
            f"cannot be made to choose {top_k} beside layers with another number"
        )


@contextmanager
def at_top_k(model: PreTrainedModel, top_k: int | None) -> Iterator[None]:
    """While open, `set_top_k(model, top_k)`; None changes nothing. Layers may differ before."""
    before = _every_place(model) if top_k else []
    if top_k:
        set_top_k(model, top_k)
    try:
        yield
    finally:
        for holder, field, value in before:
            setattr(holder, field, value)


@torch.no_grad()
def learns_with_one(layer: MoELayer) -> bool:
    """Whether a router weight says anything where a token gets one expert.

    Renormalised, it is always 1, and a task's loss has no gradient for the router. Tried on random
    rows and tokens; the layer may be on the meta device, and is not changed.
    """
    bare = skeleton(layer)
    for holder, field, _ in top_k_places(bare.router.modules()):
        setattr(holder, field, 1)
    _, weight_TK, _ = route(bare, probe(bare))
    return not torch.allclose(weight_TK, weight_TK[:1].expand_as(weight_TK))


@torch.no_grad()
def chosen_by(layer: MoELayer) -> int:
    """How many experts the layer's router gives a token, found by giving it one."""
    return route(layer, probe(layer, tokens=1))[2].shape[-1]


@contextmanager
def restricted(model: PreTrainedModel, kept: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """While open, the MoE layers `kept` names by true index have only these experts.

    As `editing.prune_layer` would leave them, but no expert's weights are copied or changed: a
    router works on its kept rows alone (gradients reach those), and its indices are mapped back.
    """
    layers = {layer.info.index: layer for layer in moe_layers(model)}
    with ExitStack() as stack:
        for index, experts in kept.items():
            stack.enter_context(restricted_layer(layers[index], experts))
        yield


@contextmanager
def restricted_layer(layer: MoELayer, kept: Sequence[int]) -> Iterator[None]:
    """The same for one layer; the number that stays has to fit its router (`layers.check_kept`)."""
    router, inside = layer.router, set(layer.experts.modules())
    if is_hashed(layer):
        raise UserError(
            f"layer {layer.info.index} chooses the experts of a token by its id: they cannot be "
            "left out for a while; prune them instead"
        )
    size = layer.info.num_experts
    rows = [
        (_holder(module, key), key, dimension, rows_of(layer, tensor, dimension, kept))
        for module, key, tensor, dimension in by_expert(layer)
        if module not in inside
    ]
    counts = [place for place in counts_of(layer) if place[0] not in inside]
    every = [*kept, *range(layer.info.num_experts, layer.info.num_rows)]  # and zero experts
    kept_E = torch.tensor(every, device=layer.experts.down_proj.device)
    inner = router.forward

    def forward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        whole = [tensors[key] for tensors, key, *_ in rows]
        cut = {}
        for (tensors, key, dimension, left), tensor in zip(rows, whole, strict=True):
            index = torch.tensor(left, device=tensor.device)
            cut[id(tensor)] = tensors[key] = tensor.index_select(dimension, index)
        try:  # the block may hand over rows of its own
            given = [cut.get(id(value), value) for value in arguments]
            also = {name: cut.get(id(value), value) for name, value in named.items()}
            logits, weights, index, *rest = inner(*given, **also)
        finally:
            for (tensors, key, *_), tensor in zip(rows, whole, strict=True):
                tensors[key] = tensor
        return logits, weights, kept_E[index], *rest

    for module, key, number in counts:
        setattr(module, key, number - size + len(kept))
    router.forward = forward
    try:
        yield
    finally:
        del router.forward
        for module, key, number in counts:
            setattr(module, key, number)


@contextmanager
def masked_layer(layer: MoELayer, kept: Sequence[int]) -> Iterator[None]:
    """While open, a layer's router gets logits and biases of -inf for all experts but `kept`.

    What `restricted_layer` does, for sets with which a router that works on groups could not be
    left: a group may keep fewer experts than another. One that keeps fewer than the router ranks
    groups by is worth -inf, and comes last. Raises UserError where the router does not make its
    logits by `torch.nn.functional.linear`.
    """
    num_experts = layer.info.num_experts
    gone = sorted(set(range(num_experts)) - set(kept))
    biases = [
        (_holder(module, key), key)
        for module, key, tensor, _ in by_expert(layer)
        if module is not layer.experts and tensor.dim() == 1 and tensor.is_floating_point()
    ]
    num_rows = layer.info.num_rows + further_rows(layer)
    inner = layer.router.forward

    def forward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        whole = [tensors[key] for tensors, key in biases]
        masked = {}
        for (tensors, key), tensor in zip(biases, whole, strict=True):
            masked[id(tensor)] = tensors[key] = _minus_infinity(tensor, gone)
        try:
            with _MaskedLinear(num_rows, gone):
                given = [masked.get(id(value), value) for value in arguments]
                also = {name: masked.get(id(value), value) for name, value in named.items()}
                output: tuple[Tensor, ...] = inner(*given, **also)
        finally:
            for (tensors, key), tensor in zip(biases, whole, strict=True):
                tensors[key] = tensor
        logits_TE = output[0].reshape(-1, output[0].shape[-1])
        if gone and logits_TE[:, gone].max() != -torch.inf:
            raise UserError(
                f"{type(layer.router).__name__} makes its logits in a way of its own: its experts "
                "cannot be masked"
            )
        return output

    layer.router.forward = forward
    try:
        yield
    finally:
        del layer.router.forward


def _holder(module: nn.Module, key: str) -> dict[str, Any]:
    """Where torch holds a module's tensor: any tensor may stand there for a while."""
    return module._parameters if key in module._parameters else module._buffers


class _MaskedLinear(TorchFunctionMode):
    """While open, products with the router's number of rows are -inf in those that are `gone`."""

    def __init__(self, num_rows: int, gone: Sequence[int]):
        super().__init__()
        self.num_rows, self.gone = num_rows, gone

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        result = function(*arguments, **(named or {}))
        if function is F.linear and result.shape[-1] == self.num_rows:
            return _minus_infinity(result, self.gone)
        return result


def _minus_infinity(tensor: Tensor, gone: Sequence[int]) -> Tensor:
    changed = tensor.detach().clone()
    changed[..., gone] = -torch.inf
    return changed
