"""A condensed layer made of any of a layer's hidden units: what each computes, and the MLP of some.

A dense gated MLP is down(act(gate(x)) * up(x)): every hidden unit is a row of gate and of up, and a
column of down. Those of the shared experts and of all routed experts can stand side by side in one,
whichever of them they are, where the block is a plain sum of gated MLPs (`condensing.dense_terms`).
Letters: N hidden units, W those of the dense MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe_lab.models.condensing import dense_terms, part_widths
from moe_lab.models.editing import DenseMLP
from moe_lab.models.layers import MoELayer
from moe_lab.types import LayerInfo, UserError

SHARED_PART = -1  # in the place of an expert's number: the shared experts


def units_name(index: int) -> str:
    """What a plan calls the hidden units [W, 2] (expert or -1, unit) of condensed layer `index`."""
    return f"layers.{index}.condensed.units"


def columns_name(index: int) -> str:
    """What a plan calls the down projection [D, W] of condensed layer `index`."""
    return f"layers.{index}.condensed.down_proj"


def rows_name(index: int, which: str) -> str:
    """What a plan calls its `gate_proj` or `up_proj` [W, D], where it has been fitted, too."""
    return f"layers.{index}.condensed.{which}"


def all_units(info: LayerInfo, experts: Sequence[int] | None = None) -> Tensor:
    """The hidden units [N, 2] (expert or SHARED_PART, unit) of the shared and of these experts.

    None: of all experts. The shared ones come first, in the order of `condensing.condensed`.
    """
    chosen = range(info.num_experts) if experts is None else experts
    parts = [*([SHARED_PART] if info.shared else []), *chosen]
    return torch.cat([
        torch.stack([torch.full((width,), part), torch.arange(width)], dim=1)
        for part, width in zip(parts, part_widths(info, chosen), strict=True)
    ])  # fmt: skip


class UnitWeights:
    """The weights of a layer's hidden units, on the layer's device; factors: of its two sums.

    Raises UserError where the layer cannot be one dense gated MLP.
    """

    def __init__(self, layer: MoELayer):
        factors = dense_terms(layer)
        if factors is None:
            raise UserError(
                f"layer {layer.info.index}: {type(layer.block).__name__} is condensed in its own "
                "block, since it is no plain sum of gated MLPs, and such a layer has no closed "
                "form here: condense.refit=none, and experts and layers by the other choices"
            )
        self.layer, self.factors = layer, factors

    def rows(self, units_N2: Tensor) -> tuple[Tensor, Tensor]:
        """Their rows of the gate and up projections, [N, D] each."""
        experts, shared = self.layer.experts, self.layer.shared
        width = experts.down_proj.shape[2]
        flat = experts.gate_up_proj.flatten(0, 1)
        expert_N, unit_N = units_N2.to(flat.device).unbind(1)
        place_N = expert_N.clamp(min=0) * 2 * width + unit_N.clamp(max=width - 1)
        gate_ND, up_ND = flat[place_N], flat[place_N + width]
        if shared is not None:
            of_shared = expert_N == SHARED_PART
            gate_ND[of_shared] = shared.get_parameter("gate_proj.weight")[unit_N[of_shared]]
            up_ND[of_shared] = shared.get_parameter("up_proj.weight")[unit_N[of_shared]]
        return gate_ND, up_ND

    def columns(self, units_N2: Tensor) -> Tensor:
        """Their columns of the down projections [N, D], the factors of the block's sums inside."""
        experts, shared = self.layer.experts, self.layer.shared
        expert_N, unit_N = units_N2.to(experts.down_proj.device).unbind(1)
        width = experts.down_proj.shape[2]
        columns_ND = experts.down_proj[expert_N.clamp(min=0), :, unit_N.clamp(max=width - 1)]
        columns_ND = columns_ND * self.factors.routed
        if shared is not None:
            of_shared = expert_N == SHARED_PART
            whole_DI = shared.get_parameter("down_proj.weight")
            columns_ND[of_shared] = whole_DI[:, unit_N[of_shared]].T * self.factors.shared
        return columns_ND

    def hidden(self, units_N2: Tensor) -> Callable[[Tensor], Tensor]:
        """What computes, of tokens [T, D], their activations [T, N]."""
        gate_ND, up_ND = self.rows(units_N2)
        activation = self.layer.experts.act_fn
        return lambda x_TD: activation(x_TD @ gate_ND.T) * (x_TD @ up_ND.T)


def dense_of(
    layer: MoELayer,
    width: int,
    units_W2: Tensor | None = None,
    columns_DW: Tensor | None = None,
    rows: tuple[Tensor, Tensor] | None = None,
) -> DenseMLP:
    """A dense MLP of a layer's hidden units with this down projection.

    rows: gate and up projections [W, D] in the place of the units' own. Without units: the shapes
    alone, on the layer's device, weights to come.
    """
    weights, like = UnitWeights(layer), layer.experts.down_proj
    made = DenseMLP(
        layer.info.hidden_size, width, layer.experts.act_fn, device=like.device, dtype=like.dtype
    )
    made.requires_grad_(False)
    if units_W2 is not None and columns_DW is not None:
        gate_WD, up_WD = weights.rows(units_W2) if rows is None else rows
        parts = ((made.gate_proj, gate_WD), (made.up_proj, up_WD), (made.down_proj, columns_DW))
        for linear, tensor in parts:
            linear.weight = nn.Parameter(tensor.to(like), requires_grad=False)
    return made
