"""Routers behind which a rule leaves out some of the experts that they chose, token by token.

The router chooses as ever; then the rule (`skip_rules.py`) looks at its scores and weights, and
what it leaves out gets the weight 0 and is not computed. Nothing is trained and no tensor changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

from torch import Tensor, nn

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.experts import Experts
from moe_lab.models.layers import MoELayer
from moe_lab.models.remapped import WITHOUT_SENTINEL
from moe_lab.types import UserError


class TokenRule(Protocol):
    """What leaves out experts of a token."""

    def applied(self, logits_TE: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
        """The weights that the router gave, 0 for experts that are left out."""
        ...


class SkippingRouter(nn.Module):
    """Mixed into a family's router. skipping: the rule, None while it rests."""

    skipping: TokenRule | None


class SkippingExperts(Experts):
    """Mixed into a family's experts: what has the weight 0 is not computed."""

    def forward(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sum of the experts that stay."""
        return super().forward(hidden_states, self._to_nobody(index_TK, weight_TK), weight_TK)

    def _to_nobody(self, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The choices, `num_experts` where there is none: transformers' own index of nobody."""
        how = self.config._experts_implementation
        family = any(kind.__name__ in WITHOUT_SENTINEL for kind in type(self).__mro__)
        plain = isinstance(self, AdaptedExperts) and not self.is_ours()
        if plain or (family and how == "eager"):  # computed, and added with the weight 0
            return index_TK
        return index_TK.masked_fill(weight_TK == 0, self.num_experts)


def skip(layer: MoELayer, rule: TokenRule) -> None:
    """Give a layer's router a rule, in place; UserError where it cannot have one."""
    check_skipping(layer)
    if not isinstance(layer.router, SkippingRouter):
        kind: Any = type(layer.router)
        layer.router.__class__ = _with_rule(kind)
    if not isinstance(layer.experts, SkippingExperts):
        layer.experts.__class__ = _leaving_out(type(layer.experts))  # type: ignore[arg-type]
        layer.experts._is_expert_parallel = True  # an index of num_experts is nobody's
    cast(SkippingRouter, layer.router).skipping = rule


def check_skipping(layer: MoELayer) -> None:
    """Refuse a layer whose router's weights do not say alone what is computed."""
    info = layer.info
    if info.real_experts or info.zero_experts:
        raise UserError(
            f"layer {info.index}: rows of its router lead to no expert of their own (stand-ins, "
            "shared or zero experts), so that no rule can leave experts out token by token; "
            "method.rule=listed and lexi give each layer a number"
        )
    if info.top_k < 2:
        raise UserError(
            f"layer {info.index}: its router chooses 1 expert for each token, so that none can be "
            "left out"
        )


def check_not_skipping(layer: MoELayer) -> None:
    """Refuse to let router rows lead elsewhere behind a rule, which would not see where."""
    if is_skipping(layer):
        raise UserError(
            f"layer {layer.info.index}: a rule leaves out some of a token's experts there, so that "
            "no router row can lead to a stand-in or a shared expert: compress the model that it "
            "comes from, or ask for method.replacement=nothing (a merge: for "
            "method.router=dominant)"
        )


def is_skipping(layer: MoELayer) -> bool:
    """Whether a rule leaves out experts of the layer token by token."""
    return isinstance(layer.router, SkippingRouter)


@contextmanager
def none_skipped(model: nn.Module) -> Iterator[None]:
    """While open, all routers in a module give all the experts that they choose."""
    routers = [one for one in model.modules() if isinstance(one, SkippingRouter)]
    rules = [router.skipping for router in routers]
    for router in routers:
        router.skipping = None
    try:
        yield
    finally:
        for router, rule in zip(routers, rules, strict=True):
            router.skipping = rule


@functools.cache
def _with_rule(kind: type[nn.Module]) -> type[nn.Module]:
    inner: Callable[..., tuple[Tensor, ...]] = kind.forward

    @functools.wraps(inner)  # whoever asks what a router must be given is told the family's
    def forward(self: SkippingRouter, *arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        logits, weight, index, *rest = inner(self, *arguments, **named)
        if self.skipping is not None:
            weight = self.skipping.applied(logits, weight, index)
        return logits, weight, index, *rest

    own = {"forward": forward, "__module__": __name__}
    return type(f"Skipping{kind.__name__}", (SkippingRouter, kind), own)


@functools.cache
def _leaving_out(kind: type[Experts]) -> type[SkippingExperts]:
    return type(f"Skipping{kind.__name__}", (SkippingExperts, kind), {"__module__": __name__})
