"""Numbers that are none, found where a stage ends with some: NaN decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_lab.types import NotFinite, UserError

if TYPE_CHECKING:
    from torch import Tensor


def check_experts(value_E: Tensor, what: str, layer: int) -> None:
    """Refuse a value for each expert of a layer, [E] or [E, ...], that is not finite.

    The NotFinite names the first such expert, and all of them where each is.
    """
    if bool(value_E.isfinite().all()):
        return
    rows_E = value_E.isfinite().reshape(len(value_E), -1).all(dim=1)
    first = int((~rows_E).nonzero()[0])
    which = "each expert" if len(rows_E) > 1 and not bool(rows_E.any()) else f"expert {first}"
    bad = value_E[first].reshape(-1)
    word = number_word(float(bad[~bad.isfinite()][0]))
    raise NotFinite(f"layer {layer}, {which}: {what} is {word}", layer)


def check_scores(index: int, num_experts: int, score_E: Tensor, source: str) -> None:
    """Refuse scores of a layer's experts that rank nothing: not finite, or not one for each.

    What they are made from is known to be finite, so that the formula is to blame.
    """
    if tuple(score_E.shape) != (num_experts,):
        raise UserError(
            f"layer {index}: {source} gives values of shape {list(score_E.shape)}, and there are "
            f"{num_experts} experts: one number for each is needed"
        )
    try:
        check_experts(score_E, f"the value by {source}", index)
    except NotFinite as error:
        raise UserError(
            f"{error}. The statistics that it is made from are finite, so that its formula has no "
            "value here, as a mean over no token has none (`LayerStatistics.mean` gives 0): it "
            "must be finite for every expert"
        ) from error


def check_neuron_scores(index: int, shape: tuple[int, ...], score: Tensor, source: str) -> None:
    """The same of scores of hidden units, which have to be of this shape."""
    if tuple(score.shape) != shape:
        raise UserError(
            f"layer {index}: {source} gives values of shape {list(score.shape)}, and there are "
            f"{list(shape)} hidden units: one number for each is needed"
        )
    if not bool(score.isfinite().all()):
        place = (~score.isfinite()).nonzero()[0].tolist()
        raise UserError(
            f"layer {index}: the value by {source} of hidden unit {place} is "
            f"{number_word(float(score[tuple(place)]))}, and the statistics that it is made from "
            "are finite: its formula must have a value for every one"
        )


def check_number(value: float, what: str, layer: int | None = None) -> None:
    """Refuse a number that is not finite."""
    if not math.isfinite(value):
        raise NotFinite(f"{what} is {number_word(value)}", layer)


def number_word(value: float) -> str:
    """NaN, infinite, -infinite; or the number."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    return f"{value:g}"


def not_finite_in(value: Any, place: str = "") -> str | None:
    """Where plain values (of JSON) hold a number that is none: "scores[3]"; None where all are."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    if isinstance(value, Mapping):
        parts = {f"{place}.{key}" if place else str(key): one for key, one in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {f"{place}[{number}]": one for number, one in enumerate(value)}
    else:
        return None
    return next((found for key, one in parts.items() if (found := not_finite_in(one, key))), None)
