"""The rules by which a router leaves out some of the experts that it chose, token by token.

A rule looks at the router's scores and weights of one token, and at nothing else. Letters: see
`types.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor

from moe_lab.models.layers import MoELayer
from moe_lab.models.routers import SCORINGS
from moe_lab.models.skipping import SkippingRouter
from moe_lab.types import SkipName, UserError

OF_DISTRIBUTION = ("entropy", "top_p")  # the rules that look at the router's whole distribution


@dataclass(frozen=True)
class Skipping:
    """A rule of one layer. With g_1 >= g_2 >= ... the absolute values of a token's weights, which
    some families scale, and p the router's distribution:

    ratio: of those behind the first, experts with g_j >= value * g_1 stay (NAEE 2402.14800).
    weight: of those behind the first, experts with g_j >= value stay.
    entropy: the first k_t = value + ceil(H / ln N * (K - value)), H the entropy of p over the N
    experts, K how many the router chose.
    top_p: the smallest set of the first ones that has sum p >= value, or all K.
    first: the first `value`.

    renormalize: whether the weights that stay are scaled to the sum of all K. scoring: which of
    SCORINGS makes p, where the rule needs it.
    """

    rule: SkipName
    value: float
    renormalize: bool = True
    scoring: str | None = None

    def __post_init__(self) -> None:
        known = self.rule in get_args(SkipName) and isinstance(self.value, (int, float))
        if not known or (self.rule in OF_DISTRIBUTION and self.scoring not in SCORINGS):
            raise UserError(
                f"a rule {self.rule!r} of the scoring {self.scoring!r} is not known: there are "
                f"{', '.join(get_args(SkipName))}, and {', '.join(SCORINGS)}"
            )

    def applied(self, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
        """The weights that the router gave, 0 for experts that are left out; any leading shape."""
        kept = self.kept(
            logits_TE.reshape(-1, logits_TE.shape[-1]),
            weight_TK.reshape(-1, weight_TK.shape[-1]),
            index_TK.reshape(-1, index_TK.shape[-1]),
        ).reshape(weight_TK.shape)
        left = weight_TK * kept
        if self.renormalize:
            tiny = torch.finfo(torch.float32).tiny
            whole, rest = (one.float().sum(dim=-1, keepdim=True) for one in (weight_TK, left))
            left = (left.float() * (whole / rest.clamp(min=tiny))).to(weight_TK.dtype)
        return left

    @torch.no_grad()
    def kept(self, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
        """Which of a token's experts stay, bool [T, K], in the order of the router's choice."""
        weight_TK, order_TK = weight_TK.float().abs().sort(dim=1, descending=True, stable=True)
        if self.rule == "ratio":
            ranked_TK = weight_TK >= self.value * weight_TK[:, :1]
        elif self.rule == "weight":
            ranked_TK = weight_TK >= self.value
        elif self.rule == "top_p":
            share_TE = distribution(logits_TE, cast(str, self.scoring))
            ranked_TK = shares_before(share_TE, index_TK.gather(1, order_TK)) < self.value
        else:
            ranked_TK = torch.arange(weight_TK.shape[1], device=weight_TK.device) < self._number(
                logits_TE, weight_TK.shape[1]
            )
            ranked_TK = ranked_TK.expand_as(weight_TK)
        first_TK = torch.zeros_like(ranked_TK)
        first_TK[:, 0] = True
        return torch.zeros_like(ranked_TK).scatter(1, order_TK, ranked_TK | first_TK)

    def _number(self, logits_TE: Tensor, top_k: int) -> Tensor:
        """How many experts a token gets, [T, 1] or [1, 1]."""
        if self.rule == "first":
            return torch.full((1, 1), int(self.value), device=logits_TE.device)
        entropy_T = relative_entropy(distribution(logits_TE, cast(str, self.scoring)))
        return (self.value + (entropy_T * (top_k - self.value)).ceil()).long()[:, None]


def distribution(logits_TE: Tensor, scoring: str) -> Tensor:
    """The router's scores as shares of their sum [T, E], in float32."""
    score_TE = SCORINGS[scoring](logits_TE.float())
    tiny = torch.finfo(score_TE.dtype).tiny
    return score_TE / score_TE.sum(dim=1, keepdim=True).clamp(min=tiny)


def relative_entropy(share_TE: Tensor) -> Tensor:
    """The entropy of each token's shares over that of even ones, from 0 to 1: [T]."""
    number = share_TE.shape[1]
    if number == 1:
        return share_TE.new_zeros(len(share_TE))
    tiny = torch.finfo(share_TE.dtype).tiny
    entropy_T = -(share_TE * share_TE.clamp(min=tiny).log()).sum(dim=1)
    return (entropy_T / torch.tensor(float(number)).log()).clamp(0.0, 1.0)


def shares_before(share_TE: Tensor, ranked_TK: Tensor) -> Tensor:
    """What the experts before each one in a token's choice, heaviest first, have together."""
    chosen_TK = share_TE.gather(1, ranked_TK.clamp(max=share_TE.shape[1] - 1))
    return chosen_TK.cumsum(dim=1) - chosen_TK


def rule_of(layer: MoELayer) -> Skipping | None:
    """The rule by which a layer leaves out experts token by token; None where it has none."""
    rule = layer.router.skipping if isinstance(layer.router, SkippingRouter) else None
    return rule if isinstance(rule, Skipping) else None
