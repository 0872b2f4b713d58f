"""The matrices of a layer's experts as [E, out, in], whatever the layout of their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_lab.models.experts import Experts
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.widths import widths_of


def expert_matrices(experts: Experts) -> dict[str, Tensor]:
    """Views [E, out, in] of the projections, by the names of `HiddenUnits.tensors`.

    Gate and up projection may be one of them: their outputs stand one after the other, or in turns.
    Biases are not among them.
    """
    units = HiddenUnits(experts)
    made = {}
    for name, (axis, _) in units.places.items():
        if not name.endswith("_bias"):
            inputs = axis if name == units.down else 1 - axis
            made[name] = units.tensors[name].movedim(inputs + 1, 2)
    return made


def own_part(experts: Experts, name: str, expert: int) -> Tensor:
    """One expert's matrix [out, in], a view, without the zeros of a narrow expert (`widths.py`).

    Only the down projection has them among its inputs.
    """
    units, matrix = HiddenUnits(experts), expert_matrices(experts)[name][expert]
    return matrix[:, : widths_of(experts)[expert]] if name == units.down else matrix


@contextmanager
def other_matrices(experts: Experts, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the projections have other values [E, out, in], by their names."""
    matrices = expert_matrices(experts)
    before = {name: matrices[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            matrices[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                matrices[name].copy_(value)
