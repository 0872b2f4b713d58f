"""What it costs to store experts in fewer bits, measured: the error of a layer's output.

Of an expert alone, the others being whole (x_t its tokens, g_t the router's weights of it, f what
it computes, f^b the same in b bits, w_t what a token weighs):

    error(e, b) = 1/(T D) sum over t of w_t g_t^2 ||f(x_t) - f^b(x_t)||^2

the squared change of what the layer adds to the residual stream, T all tokens of the text and D the
hidden size; of a layer whose experts are all in b bits, with y_t the state that leaves it,

    error(l, b) = 1/(T D) sum over t of w_t ||y_t - y_t^b||^2

Errors of several experts or layers are added up: that they do not make up for each other is an
assumption. w_t is 1, or 1 / mean square of y_t, so that layers whose states differ in size by
orders of magnitude are compared by relative errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from moe_lab.models.rounding import Levels
from moe_lab.models.stream import States
from moe_lab.profile.grams import weights_of_states
from moe_lab.profile.routed_tokens import OfExpert, RoutedTokens
from moe_lab.quantize.expert_levels import with_levels

ExpertLevels = Mapping[str, Levels]  # an expert's matrices by name


def expert_errors(
    tokens: RoutedTokens, expert: int, given: OfExpert, candidates: Sequence[ExpertLevels]
) -> list[float]:
    """The error of one expert with each of these levels; 0 where it gets no token."""
    weight_N = tokens.weighs()[given.row_N]
    whole_ND = tokens.added(expert, given)
    errors = []
    for levels in candidates:
        with with_levels(tokens.layer, expert, levels):
            lost_ND = whole_ND - tokens.added(expert, given)
        errors.append(_weighted_square(lost_ND, weight_N) / tokens.num_tokens)
    return errors


def layer_errors(
    tokens: RoutedTokens,
    states: States,
    candidates: Sequence[Sequence[ExpertLevels]],
    token_weight: str,
) -> list[float]:
    """The error of a layer with each of these levels of all of its experts."""
    stream, index = tokens.stream, tokens.layer.info.index
    replay = functools.partial(stream.replay, index)
    return [
        sum(
            _changed(replay, tokens, batch, states[batch], one, token_weight)
            for batch in range(stream.num_batches)
        )
        / tokens.num_tokens
        for one in candidates
    ]


@torch.no_grad()
def _changed(
    replay: Callable[[int, Tensor], Tensor],
    tokens: RoutedTokens,
    batch: int,
    hidden: Tensor,
    candidate: Sequence[ExpertLevels],
    token_weight: str,
) -> float:
    valid = tokens.stream.valid[batch]
    whole_TD = replay(batch, hidden)[valid]
    with ExitStack() as stack:
        for expert, levels in enumerate(candidate):
            stack.enter_context(with_levels(tokens.layer, expert, levels))
        lost_TD = whole_TD - replay(batch, hidden)[valid]
    return _weighted_square(lost_TD, weights_of_states(whole_TD, token_weight))


def _weighted_square(lost_ND: Tensor, weight_N: Tensor) -> float:
    return float((lost_ND.double().square().mean(dim=1) * weight_N.double()).sum())
