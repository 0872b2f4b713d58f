"""Experts with fewer hidden units: cut out of a layer for good, or silenced for a while.

Letters: E experts, I hidden units of each, W those of the widest one that stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, check_own_rows, has_hidden_units, moe_layers
from moe_lab.models.rounded_layer import rounded_layer
from moe_lab.models.rounding import Scheme
from moe_lab.models.routers import restricted_layer
from moe_lab.models.widths import keep_widths, widths_of
from moe_lab.types import UserError

GROUPED, EAGER = "grouped_mm", "eager"  # two of transformers' ways to compute experts
GROUPED_BYTES = 16  # of which a row of a matrix must be a multiple for torch's grouped products


def neurons_name(index: int) -> str:
    """What a plan calls the neurons that stay [E, I] of decoder layer `index`: 1, the others 0."""
    return f"layers.{index}.neurons"


def shared_neurons_name(index: int) -> str:
    """The same [I] of its shared experts."""
    return f"layers.{index}.shared_neurons"


def neuron_scores_name(index: int) -> str:
    """What a plan calls the scores [E, I] of the neurons of decoder layer `index`."""
    return f"layers.{index}.neuron_scores"


def down_proj_name(index: int) -> str:
    """What a plan calls the new down projections [E, D, W] of what stays in layer `index`."""
    return f"layers.{index}.down_proj"


def places_of_kept(kept_EI: Tensor) -> Tensor:
    """The kept units ([E, I] bool) of each expert in ascending order [E, W], -1 behind the last."""
    widths = kept_EI.sum(dim=1)
    order_EI = (~kept_EI).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(widths.max())]
    place_W = torch.arange(order_EI.shape[1])
    return order_EI.masked_fill(place_W >= widths[:, None], -1)


@torch.no_grad()
def narrow_experts(layer: MoELayer, kept_EW: Tensor) -> None:
    """Leave each expert of a layer its units kept_EW[e] in that order, in place; -1: none there.

    Experts with fewer than W have zeros behind them in memory, which are no units of theirs
    (`widths.py`). Where W is more than the widest one has left, it becomes as many.
    """
    check_own_rows(layer.info)
    kept_EW = _their_own(kept_EW.cpu(), widths_of(layer.experts))
    widths = (kept_EW >= 0).sum(dim=1).tolist()
    HiddenUnits(layer.experts).keep(kept_EW)
    keep_widths(layer.experts, widths, range(len(widths)))


def _their_own(kept_EW: Tensor, widths: Sequence[int]) -> Tensor:
    """The same without units that are zeros behind an expert's own, the others moved to the front.

    widths: how many each expert has.
    """
    gone_EW = (kept_EW < 0) | (kept_EW >= torch.tensor(widths)[:, None])
    order_EW = gone_EW.to(torch.uint8).argsort(dim=1, stable=True)
    return kept_EW.masked_fill(gone_EW, -1).gather(1, order_EW)


SHARED_UP = ("gate_proj", "up_proj")


def check_shared(layer: MoELayer) -> None:
    """Refuse shared experts whose hidden units are not known."""
    shared = layer.shared
    if shared is None or not has_hidden_units(shared):
        what = "no shared expert" if shared is None else f"shared experts {type(shared).__name__}"
        raise UserError(
            f"method.shared=true: layer {layer.info.index} has {what}, of which no hidden units "
            "are known: method.shared=false"
        )


@torch.no_grad()
def widen_shared(layer: MoELayer, width: int) -> None:
    """Give the shared experts of a layer so many hidden units, zeros behind theirs, in place."""
    assert layer.shared is not None
    for name, child in layer.shared.named_children():
        if not isinstance(child, nn.Linear):
            continue
        axis = 0 if name in SHARED_UP else 1
        child.weight = _longer(child.weight, axis, width)
        if axis == 0:
            child.out_features = width
            if child.bias is not None:
                child.bias = _longer(child.bias, 0, width)
        else:
            child.in_features = width
    _say_shared_width(layer, width)


def _longer(tensor: Tensor, axis: int, length: int) -> nn.Parameter:
    shape = list(tensor.shape)
    shape[axis] = length
    whole = tensor.new_zeros(shape)
    whole.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return nn.Parameter(whole, tensor.requires_grad)


def _say_shared_width(layer: MoELayer, width: int) -> None:
    for key, value in vars(layer.shared).items():
        if type(value) is int and "intermediate" in key and value == layer.info.shared_width:
            setattr(layer.shared, key, width)


@torch.no_grad()
def narrow_shared(layer: MoELayer, kept_I: Sequence[int]) -> None:
    """Leave the shared experts of a layer these hidden units, in that order, in place."""
    check_shared(layer)
    assert layer.shared is not None
    for name, child in layer.shared.named_children():
        if not isinstance(child, nn.Linear):
            continue
        index = torch.tensor(list(kept_I), device=child.weight.device)
        axis = 0 if name in SHARED_UP else 1
        cut = child.weight.index_select(axis, index)
        child.weight = nn.Parameter(cut, child.weight.requires_grad)
        if axis == 0:
            child.out_features = len(index)
            if child.bias is not None:
                child.bias = nn.Parameter(child.bias[index], child.bias.requires_grad)
        else:
            child.in_features = len(index)
    _say_shared_width(layer, len(kept_I))


def fits_grouped(model: PreTrainedModel) -> bool:
    """Whether torch's grouped products can compute a model's experts; True where nothing asks them.

    They need rows of a multiple of 16 bytes: of 8 hidden units in bfloat16, of 4 in float32. The
    model may be on the meta device, and what counts is the dtype in which its tensors are.
    """
    return not any(
        one.info.expert_width * one.experts.down_proj.element_size() % GROUPED_BYTES
        for one in moe_layers(model)
        if not isinstance(one.experts, AdaptedExperts)  # which compute by the family's own code
    )


def fit_implementation(model: PreTrainedModel) -> bool:
    """Let a model compute its experts by transformers' eager code where grouped products cannot.

    Whether that was changed: another way, which somebody chose, stays.
    """
    if fits_grouped(model):
        return False
    ways = {one.experts.config._experts_implementation for one in moe_layers(model)}
    if not ways <= {GROUPED, None}:
        return False
    model.set_experts_implementation(EAGER)
    return True


@contextmanager
def narrowed_layer(layer: MoELayer, kept_EI: Tensor) -> Iterator[None]:
    """While open, the units that are not kept ([E, I] bool) of a layer's experts add nothing."""
    units = HiddenUnits(layer.experts)
    whole = units.tensors[units.down].detach().clone()
    units.silence(kept_EI)
    try:
        yield
    finally:
        with torch.no_grad():
            units.tensors[units.down].copy_(whole)


class Cut(NamedTuple):
    """What stays of a layer: these experts, and of all of them the hidden units [E, I] (bool).

    scheme: in which few bits that is stored (rounded to nearest); None: as it is.
    """

    experts: tuple[int, ...]
    neurons: Tensor
    scheme: Scheme | None = None


Left = Sequence[int] | Tensor | Cut


@contextmanager
def left_with(model: PreTrainedModel, kept: Mapping[int, Left]) -> Iterator[None]:
    """While open, the MoE layers that `kept` names by true index have only this.

    A sequence names experts (`routers.restricted`), a tensor [E, I] the hidden units of all of
    them.
    """
    layers = {layer.info.index: layer for layer in moe_layers(model)}
    with ExitStack() as stack:
        for index, some in kept.items():
            layer = layers[index]
            if isinstance(some, Cut):
                if some.scheme is not None:
                    kept_EI = some.neurons
                    stack.enter_context(rounded_layer(layer, some.scheme, kept_EI=kept_EI))
                stack.enter_context(narrowed_layer(layer, some.neurons))
            if isinstance(some, Tensor):
                stack.enter_context(narrowed_layer(layer, some))
            else:
                experts = some.experts if isinstance(some, Cut) else some
                stack.enter_context(restricted_layer(layer, experts))
        yield
