"""What is read off an MoE layer's weights: no text enters it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_lab.finite import check_experts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, by_expert, has_hidden_units
from moe_lab.models.remapped import by_row
from moe_lab.profile.layer import CACHED, OF_NEURONS, SHARED
from moe_lab.types import UserError


def weight_statistics(layer: MoELayer) -> dict[str, Tensor]:
    """All of it by name, in float64; the layer's weights are in memory.

    NotFinite where a vector of the router or the experts, which no sum tells of, is not finite.
    """
    check_vectors(layer)
    return {"router_norm": router_row_norms(layer), **weight_sums(layer)}


@torch.no_grad()
def neuron_statistics(layer: MoELayer) -> dict[str, Tensor]:
    """What is read off the weights of each hidden unit, by name, in float64.

    down_abs_sum and down_square_sum [E, I], of the absolute values and squares in its column of the
    down projection; neuron_square_sum [E, I], of the squares of all its weights. The same of the
    shared experts [1, I] with "shared_" before the names, where they are a plain or gated MLP.
    """
    units = HiddenUnits(layer.experts)
    absolute, square = _by_unit(units.tensors[units.down], units.places[units.down][0])
    every = torch.zeros_like(square)
    for name, (axis, place_IN) in units.places.items():
        square_ER = _by_unit(units.tensors[name], axis)[1]
        every += square_ER[:, place_IN.to(square_ER.device)].sum(dim=2)
    found = dict(zip(OF_NEURONS, (absolute, square, every), strict=True))
    if layer.shared is not None and has_hidden_units(layer.shared):
        children = layer.shared.named_children()
        weights = {name: one.weight for name, one in children if isinstance(one, nn.Linear)}
        absolute, square = _by_unit(weights.pop("down_proj").T[None], 0)
        every = square + torch.stack([_by_unit(one[None], 0)[1] for one in weights.values()]).sum(0)
        values = (absolute, square, every)
        found |= {SHARED + name: value for name, value in zip(OF_NEURONS, values, strict=True)}
    return {name: value.cpu() for name, value in found.items()}


def _by_unit(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The sums [E, R] of the absolute values and of the squares at each place of an axis.

    Of one expert's part of a tensor [E, ...]. Added up in float32 at least; they are float64.
    """
    others = [dim for dim in range(1, tensor.dim()) if dim != axis + 1]
    shape = len(tensor), tensor.shape[axis + 1]
    absolute_ER, square_ER = (tensor.new_zeros(shape, dtype=torch.float64) for _ in range(2))
    for size, place in _absolute(tensor, axis + 1):
        absolute_ER[place] = (size.sum(dim=others) if others else size).double()
        size.square_()
        square_ER[place] = (size.sum(dim=others) if others else size).double()
    return absolute_ER, square_ER


def _absolute(tensor: Tensor, dim: int) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
    """The absolute values of a tensor [E, ...], some experts and places of `dim` at a time.

    In float32 at least, and all in one place of memory: a new one each time would cost more than
    what is computed there. With which experts, and which places, they are.
    """
    exact = torch.promote_types(tensor.dtype, torch.float32)
    size, length = tensor[0].numel(), tensor.shape[dim]
    few, some = max(1, CACHED // size), min(length, max(1, CACHED * length // size))
    held = torch.empty(few * some * size // length, dtype=exact, device=tensor.device)
    for experts in range(0, len(tensor), few):
        for start in range(0, length, some):
            place = slice(experts, experts + few), slice(start, start + some)
            part = tensor.detach()[place[0]].narrow(dim, start, min(some, length - start))
            yield held[: part.numel()].view(part.shape).copy_(part).abs_(), place


def check_vectors(layer: MoELayer) -> None:
    """Refuse biases and factors by expert that are NaN or infinite: a router's bias alone decides.

    A bias of -inf is one that masks its expert.
    """
    inside = set(layer.experts.modules())
    for module, name, tensor, dimension in by_expert(layer):
        dimensions = sum(size > 1 for size in tensor.shape) - int(module in inside)
        if tensor.is_floating_point() and dimensions <= 1:
            rows = tensor.detach().movedim(dimension, 0)
            masked = rows.masked_fill(rows == -torch.inf, 0.0)
            check_experts(masked, f"its part of {name}", layer.info.index)


def router_row_norms(layer: MoELayer) -> Tensor:
    """l2 norm [E] of each expert's row of the router's weight."""
    own = set(layer.router.modules())
    for module, _, weight, dimension in by_expert(layer):
        if module in own and weight.dim() == 2 and weight.is_floating_point():
            rows_ED = weight.detach().movedim(dimension, 0)[: layer.info.num_experts]
            norm_E: Tensor = torch.linalg.vector_norm(rows_ED.double(), dim=1)
            return norm_E.cpu()
    raise UserError(f"{type(layer.router).__name__} has no weight with a row for each expert")


@torch.no_grad()
def weight_sums(layer: MoELayer) -> dict[str, Tensor]:
    """Over all weights of an expert's projections, without biases; by name, in float64.

    weight_abs_sum and weight_square_sum [E], of their absolute values and squares; weight_count
    [1], how many one expert has. Rows of a matrix are added up in float32 at least.
    """
    experts, count = layer.experts, 0
    up = experts.gate_up_proj[: len(experts.down_proj)] if experts.has_gate else experts.up_proj
    sum_E2 = torch.zeros(len(up), 2, dtype=torch.float64, device=up.device)
    for matrices in (up, experts.down_proj):
        for size, (few, _) in _absolute(matrices, 1):
            rows = size.sum(dim=2), torch.linalg.vector_norm(size, dim=2).double().square()
            both = [one.sum(dim=1, dtype=torch.float64) for one in rows]
            sum_E2[few] += torch.stack(both, dim=1)
        count += matrices[0].numel()
    absolute_E, square_E = sum_E2.unbind(1)
    return {
        "weight_abs_sum": by_row(layer.experts, absolute_E).cpu(),
        "weight_square_sum": by_row(layer.experts, square_E).cpu(),
        "weight_count": torch.tensor([float(count)], dtype=torch.float64),
    }
