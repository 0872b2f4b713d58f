"""New down projections for all that is left of a layer, by least squares.

With z what hidden units add by column (router's weight inside), w_n their columns after the edit,
and r_t what the output of the layer lacks at token t, changes d_n of the columns are chosen so that

    sum over tokens of c_t |r_t - sum_n z_tn d_n|^2  +  sum_n lambda_n |d_n|^2

is least, c_t what a token weighs. So where nothing is missing nothing changes, and a strong ridge
leaves what the edit left. Letters: N hidden units that are found together, D hidden size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.methods.least_squares import NormalEquations, TokenRows, fitted, solved
from moe_lab.methods.ridge import RIDGES, Ridge
from moe_lab.profile.edited_layer import EditedLayer, Lacking, Part

logger = logging.getLogger(__name__)
MOST_TOGETHER = 12_288  # hidden units whose Gram matrix is made: 1.2 GB in float64
CAUTIOUS = Ridge(1.0, "mean")  # where a part has tokens, and none in the held-out documents
SWEEPS = 2  # over the experts, where they are found one after another


class Change(NamedTuple):
    """Changes of the columns [N, D] by part, the ridges that were chosen, and what is left.

    error, held_error: shares of the squared error that was there before, on all documents and on
    those that chose the ridge; None where that was not judged.
    """

    columns: dict[Part, Tensor]
    ridges: tuple[Ridge, ...]
    error: float
    held_error: float | None


def changes(
    layer: EditedLayer, ridges: Sequence[Ridge] = RIDGES, most: int = MOST_TOGETHER
) -> Change | None:
    """The changes of all columns of a layer: together up to so many units, else part by part.

    None where nothing is missing, or no ridge leaves less of it on the held-out documents.
    """
    if not layer.square():
        return None
    if layer.num_units <= most:
        return all_at_once(layer, ridges)
    return part_by_part(layer, ridges)


def all_at_once(layer: EditedLayer, ridges: Sequence[Ridge]) -> Change | None:
    """One problem for all units of a layer."""
    found = _found(layer.rows, layer.num_units, layer.layer.info.hidden_size, ridges)
    if found is None:
        return None
    split = found.columns_ND.split([part.width for part in layer.parts])
    columns = dict(zip(layer.parts, split, strict=True))
    return Change(columns, (found.ridge,), found.error, found.held_error)


def part_by_part(
    layer: EditedLayer, ridges: Sequence[Ridge], sweeps: int = SWEEPS
) -> Change | None:
    """Part by part, each on what all others leave missing (block coordinate descent).

    One Gram matrix is there at a time, of one expert. With a ridge that is the same in every sweep
    it goes towards the solution of the problem of all units together.
    """
    before, size = layer.square(), layer.layer.info.hidden_size
    device = layer.layer.experts.down_proj.device
    columns = {part: torch.zeros(part.width, size, device=device) for part in layer.parts}
    chosen: dict[Part, Ridge] = {}
    for _ in range(sweeps):
        for part in layer.parts:
            rows = functools.partial(layer.rows_of, part, columns[part])
            found = _found(rows, part.width, size, ridges)
            new_ND = torch.zeros_like(columns[part])
            chosen.pop(part, None)
            if found is not None:
                new_ND, chosen[part] = found.columns_ND.to(new_ND), found.ridge
            layer.add(part, new_ND - columns[part])
            columns[part] = new_ND
    if not chosen:
        return None
    return Change(columns, tuple(chosen.values()), layer.square() / before, None)


class _Found(NamedTuple):
    columns_ND: Tensor
    ridge: Ridge
    error: float
    held_error: float | None


def _found(
    rows: Callable[[bool], Iterable[Lacking]], units: int, size: int, ridges: Sequence[Ridge]
) -> _Found | None:
    """The changes of some units; None where no ridge is better than none of them."""

    def tokens(held: bool) -> Iterator[TokenRows]:
        return (TokenRows(*one) for one in rows(held) if len(one.z_TN))

    first = next(tokens(False), None)
    if first is None:  # nobody gets them
        return None
    equations = NormalEquations(units, size, first.z_TN.device)
    for one in tokens(False):
        equations.add(one)
    nothing_ND = torch.zeros_like(equations.cross_ND)
    if next(tokens(True), None) is None:
        columns_ND = solved(equations, nothing_ND, CAUTIOUS)
        return _Found(columns_ND, CAUTIOUS, equations.error(columns_ND), None)
    fit = fitted(equations, lambda: tokens(True), nothing_ND, ridges)
    if not fit.held_error < fit.prior_error:
        return None
    return _Found(fit.columns_ND, fit.ridge, fit.error, fit.held_error / fit.prior_error)
