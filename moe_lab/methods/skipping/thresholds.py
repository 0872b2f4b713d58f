"""Thresholds of the rules that look at a token's weights, from those of the calibration text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.skip_rules import Skipping
from moe_lab.profile.fewer_experts import RoutedText, ask_routers
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError


def found_on_text(
    profile: Profile,
    rule: str,
    num_samples: int | None,
    rule_of: Callable[[LayerStatistics, float], Skipping],
    value_of: Callable[[LayerStatistics, RoutedText], float],
    **question: Any,
) -> tuple[Edit, ...]:
    """An edit for each MoE layer: its rule, with the value that its routing on the text gives.

    rule: the name of the method's; rule_of(layer, value): the layer's; question: what the value
    depends on beside the text and the code.
    """
    by_index = {one.info.index: one for one in profile.statistics}

    def ask(index: int, routed: RoutedText) -> dict[str, float]:
        value = value_of(by_index[index], routed)
        kept_TK = rule_of(by_index[index], value).kept(
            routed.logits_TE, routed.weight_TK, routed.index_TK
        )
        return {"value": value, "mean": float(kept_TK.double().sum(dim=1).mean())}

    known_by = {"question": f"fewer experts/{rule}"} | question
    told = ask_routers(profile, num_samples, known_by, ask, [found_on_text, value_of])
    return tuple(
        edit_of(one, rule_of(one, told[index]["value"]), told[index]["mean"])
        for index, one in by_index.items()
    )


def edit_of(one: LayerStatistics, rule: Skipping, mean: float) -> SkipExperts:
    """The edit that gives a layer a rule."""
    info = one.info
    return SkipExperts(
        info.index, info.name, rule.rule, rule.value, rule.renormalize, rule.scoring, mean
    )


def ratios(weight_TK: Tensor) -> Tensor:
    """g_j / g_1 of each token's weights behind its heaviest, g_1: [T, K - 1], largest first."""
    ranked_TK = weight_TK.double().sort(dim=1, descending=True)[0]
    return ranked_TK[:, 1:] / ranked_TK[:, :1]


def quantile(values: Tensor, share: float) -> float:
    """The value below which this share lies, between two of them by their distance: 0.5 the median.

    0 of none.
    """
    ranked, last = values.double().flatten().sort()[0], values.numel() - 1
    if last < 0:
        return 0.0
    place = share * last
    low = int(place)
    high = min(low + 1, last)
    return float(ranked[low] + (place - low) * (ranked[high] - ranked[low]))


def scoring_of(one: LayerStatistics, rule: str) -> str:
    """What makes probabilities of the router's logits; UserError where that is not known."""
    if one.scoring is None:
        raise UserError(
            f"method.rule={rule} looks at the router's whole distribution, and the weights of "
            f"layer {one.info.index} follow none of the known scorings: method.rule=ratio looks at "
            "the weights alone"
        )
    return one.scoring
