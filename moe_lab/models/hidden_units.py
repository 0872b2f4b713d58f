"""The hidden units of the experts of one layer, whatever the layout of their tensors.

A hidden unit is what one neuron of an expert is: its rows of the gate and up projections with their
biases, and its column of the down projection. Letters: E experts, I hidden units, W those of the
widest expert that stay, N places of one unit in one tensor.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.experts import Experts


class HiddenUnits:
    """Where the hidden units of an experts module lie.

    tensors: by name, those with a row for each expert; places: by name, in which axis of one
    expert's tensor its hidden units lie, and the places [I, N] of each. N is 2 where one tensor
    holds both the gate and the up projection, one after the other or interleaved. down: the name
    of the down projection among them; width: I.
    """

    def __init__(self, experts: Experts):
        self.experts = experts
        num_experts, row, column = len(experts.down_proj), 0, 1
        if experts.is_transposed:
            row, column = column, row
        self.tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in experts.named_parameters()
            if tensor.shape[0] == num_experts
        }
        if isinstance(experts, AdaptedExperts):
            self.tensors = experts.matrices()
        self.width = experts.down_proj.shape[1:][column]
        unit_I1 = torch.arange(self.width, device="cpu")[:, None]
        up, into = "up_proj", unit_I1
        if experts.has_gate:
            up, into = "gate_up_proj", self._both(self.width, unit_I1)
        self.places = {up: (row, into), "down_proj": (column, unit_I1)}
        if up not in self.tensors:  # gate, up and down projection apart, all [E, I, D]
            self.places = dict.fromkeys(self.tensors, (0, unit_I1))
        self.places |= {f"{up}_bias": (0, into)} if experts.has_bias else {}
        self.down = "down_proj" if "down_proj" in self.tensors else list(self.tensors)[-1]

    def places_of_width(self, width: int, both: bool) -> Tensor:
        """The places [I, N] of units of experts of this width; both: of gate and up together."""
        unit_I1 = torch.arange(width, device="cpu")[:, None]
        return self._both(width, unit_I1) if both else unit_I1

    def _both(self, width: int, unit_I1: Tensor) -> Tensor:
        """The places [I, 2] of units of experts of this width in a tensor of gate and up."""
        half_2 = torch.arange(2, device="cpu")
        if self.experts.is_concatenated:
            return unit_I1 + half_2 * width
        return unit_I1 * 2 + half_2

    def weights(self, expert: int) -> Tensor:
        """All weights of each hidden unit of an expert, [I, F], in float32 or better."""
        return torch.cat(list(self.parts(expert).values()), dim=1)

    def parts(self, expert: int) -> dict[str, Tensor]:
        """The same [I, F] by the name of the tensor that they stand in."""
        parts = {}
        for name, (axis, place_IN) in self.places.items():
            rows = self.tensors[name][expert].movedim(axis, 0)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            parts[name] = rows[place_IN.flatten()].reshape(len(place_IN), -1)
        return parts

    def expert(self, expert: int, order_I: Tensor | None = None) -> dict[str, Tensor]:
        """An expert's tensors by name, unit order_I[i] in the place of unit i."""
        parts = {name: tensor[expert] for name, tensor in self.tensors.items()}
        for name, (axis, place_IN) in self.places.items() if order_I is not None else ():
            device = parts[name].device
            source = place_IN[cast(Tensor, order_I).cpu()].flatten().to(device)
            rows = parts[name].index_select(axis, source)
            target = place_IN.flatten().to(device)
            parts[name] = torch.empty_like(rows).index_copy_(axis, target, rows)
        return parts

    @torch.no_grad()
    def keep(self, kept_EW: Tensor) -> None:
        """Leave expert e its units kept_EW[e], in that order, in place; -1: zeros in their place.

        A unit of zeros computes nothing: every activation of a gated or plain MLP is 0 at 0. The
        experts may be on the meta device.
        """
        kept_EW = kept_EW.to("cpu")
        width = kept_EW.shape[1]
        made = {}
        for name, (axis, place_IN) in self.places.items():
            target_WN = self.places_of_width(width, place_IN.shape[1] == 2)
            made[name] = _gathered(self.tensors[name], axis, place_IN, target_WN, kept_EW)
        if isinstance(self.experts, AdaptedExperts):
            self.experts.set_matrices(made, width)
        else:
            for name, tensor in made.items():
                asks = getattr(self.experts, name).requires_grad
                setattr(self.experts, name, nn.Parameter(tensor, asks))
        _say_width(self.experts, self.width, width)

    @torch.no_grad()
    def down_columns(self) -> Tensor:
        """The columns of the down projection [E, I, D], a view."""
        axis, _ = self.places[self.down]
        return self.tensors[self.down].movedim(axis + 1, 1)

    @torch.no_grad()
    def set_down(self, new_EDI: Tensor) -> None:
        """Put other values into the down projection, in place."""
        columns_EID = self.down_columns()
        columns_EID.copy_(new_EDI.transpose(1, 2))

    @torch.no_grad()
    def silence(self, kept_EI: Tensor) -> None:
        """Zero the down projection's columns of all units that are not kept ([E, I] bool)."""
        columns_EID = self.down_columns()
        columns_EID.masked_fill_(~kept_EI.to(columns_EID.device)[:, :, None], 0.0)


def unit_parameters(experts: Experts) -> dict[str, Tensor]:
    """The parameters that hold the hidden units of experts, by the names of `HiddenUnits.tensors`.

    They are the tensors themselves, or of an adapter's `matrices` what these are views of.
    """
    units = HiddenUnits(experts)
    tensors = {name: units.tensors[name] for name in units.places}
    return {
        name: tensor if tensor._base is None else tensor._base for name, tensor in tensors.items()
    }


def _gathered(
    tensor: Tensor, axis: int, place_IN: Tensor, target_WN: Tensor, kept_EW: Tensor
) -> Tensor:
    """A tensor [E, ...] with the places of the kept units along `axis` of each expert."""
    order = target_WN.flatten().argsort()
    shape = list(tensor.shape)
    shape[axis + 1] = len(order)
    made = tensor.new_empty(shape)
    for expert, kept_W in enumerate(kept_EW):
        source = place_IN[kept_W.clamp(min=0)].flatten()[order]
        part = tensor[expert].index_select(axis, source.to(tensor.device))
        gone = (kept_W < 0)[:, None].expand(target_WN.shape).flatten()[order]
        if gone.any():
            part.index_fill_(axis, gone.nonzero().flatten().to(tensor.device), 0.0)
        made[expert] = part
    return made


WIDTH_WORDS = ("intermediate", "expert_dim", "ffn_hidden")


def _say_width(experts: Experts, before: int, width: int) -> None:
    """Where modules of these experts say their width, let them say the new one."""
    for module in experts.modules():
        for name, value in vars(module).items():
            if type(value) is int and any(word in name for word in WIDTH_WORDS):
                factor, rest = divmod(value, before)
                if not rest:  # some say that of gate and up together
                    setattr(module, name, factor * width)
