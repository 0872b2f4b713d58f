"""Thresholds of the rules that look at a token's weights, from those of the calibration text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.routers import matching_scoring
from moe_lab.models.skip_rules import Skipping
from moe_lab.profile.fewer_experts import RoutedText, ask_routers
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

RuleOf = Callable[[LayerInfo, RoutedText], Skipping]


def found_on_text(
    profile: Profile, num_samples: int | None, rule_of: RuleOf, question: dict[str, Any]
) -> tuple[Edit, ...]:
    """An edit for each MoE layer: the rule that `rule_of` makes of its routing on the text.

    question: what the rules depend on beside the text and the code.
    """
    infos = {one.info.index: one.info for one in profile.statistics}

    def ask(index: int, routed: RoutedText) -> dict[str, Any]:
        rule = rule_of(infos[index], routed)
        kept_TK = rule.kept(routed.logits_TE, routed.weight_TK, routed.index_TK)
        return {**asdict(rule), "mean": float(kept_TK.double().sum(dim=1).mean())}

    known_by = {"question": "fewer experts/rule"} | question
    told = ask_routers(profile, num_samples, known_by, ask, [found_on_text, rule_of])
    return tuple(SkipExperts(i, info.name, **told[i]) for i, info in infos.items())


def renormalizes(wanted: bool | None, routed: RoutedText) -> bool:
    """Whether weights are scaled to what all were: as is wanted, or (None) as the family does.

    It shares them out among those that it chooses where they add up to the same for each token.
    """
    if wanted is not None:
        return wanted
    sum_T = routed.weight_TK.double().sum(dim=1)
    low, high = sum_T.aminmax()
    return bool((high - low) <= 1e-2 * high)


def quantile(values: Tensor, share: float) -> float:
    """The value below which this share lies, between two of them by their distance: 0.5 the median.

    0 of none.
    """
    return float(np.quantile(values.double().numpy(), share)) if values.numel() else 0.0


def scoring_of(info: LayerInfo, routed: RoutedText, rule: str) -> str:
    """What makes probabilities of the router's logits; UserError where that is not known."""
    scoring = matching_scoring(routed.logits_TE, routed.index_TK, routed.weight_TK)
    if scoring is None:
        raise UserError(
            f"method.rule={rule} looks at the router's whole distribution, and the weights of "
            f"layer {info.index} follow none of the known scorings: method.rule=ratio looks at the "
            "weights alone"
        )
    return scoring
