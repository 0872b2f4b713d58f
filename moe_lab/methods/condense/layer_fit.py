"""A condensed layer fitted to what it should add, by gradient steps on that layer alone.

All three projections move, from where the closed form left them: the least

    sum over tokens of w_t |down(act(gate x_t) * up x_t) - y_t|^2 / sum over tokens of w_t |y_t|^2.

No gradient passes through any other layer, and no text is predicted. Which state is the best one,
held-out documents say; then the same number of steps is taken again with these documents, too, as
with the ridges of `least_squares.fitted`. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_lab.methods.condense.layer_data import LayerTokens
from moe_lab.types import NotFinite

TOKENS_OF_A_STEP = 256  # tokens of a step
# The largest step of a matrix's numbers, as a share of their root mean square, times the root of
# how many numbers enter one of its outputs: a wide layer needs smaller ones.
RATES = (2.0, 0.5)  # the second where the first finds nothing better than the start
WARM_UP = 0.1  # share of the steps in which the rate rises; then it falls to zero
BETAS = (0.9, 0.99)
JUDGED = 5  # times on the held-out documents


class DenseWeights(NamedTuple):
    """A dense layer: its rows gate_WD, up_WD, and the columns of its down projection."""

    gate_WD: Tensor
    up_WD: Tensor
    columns_WD: Tensor


class LayerFit(NamedTuple):
    """The fitted weights, float32.

    steps: how many led to them, 0: the start was best. Relative errors on the held-out documents:
    start_error, of the start without them, and held_error, of the best state that came of it.
    """

    weights: DenseWeights
    steps: int
    start_error: float
    held_error: float


class LayerChunks(Protocol):
    """The tokens of a layer; held: those held out, or the others (`layer_data.LayerData`)."""

    def __call__(self, held: bool | None = None) -> Iterable[LayerTokens]: ...


Activation = Callable[[Tensor], Tensor]


@torch.enable_grad()
def fit_layer(
    start: DenseWeights,
    activation: Activation,
    chunks: LayerChunks,
    steps: int,
    seed: int = 0,
    unseen: DenseWeights | None = None,
) -> LayerFit:
    """Take `steps` steps of Adam, and keep what is best on held-out documents.

    unseen: the start as it is without the held-out documents, which judge fairly only what has not
    seen them; None: the start itself. Only as many tokens are in memory as the steps see; all is
    computed in float32.
    """
    begun, fitted = _exact_weights(unseen or start), _exact_weights(start)
    start_error = _error(begun, activation, chunks)
    tokens = _drawn(chunks, False, steps * TOKENS_OF_A_STEP, seed)
    for rate in RATES:
        descent = _Descent(begun, activation, tokens, steps, seed, rate)
        best, held_error = _judged(descent, chunks, start_error)
        if best:
            break
    del tokens
    if best:
        tokens = _drawn(chunks, None, steps * TOKENS_OF_A_STEP, seed)
        descent = _Descent(fitted, activation, tokens, steps, seed, rate)
        for _ in range(best):
            descent.step()
        fitted = descent.weights
        _check(fitted)
    return LayerFit(fitted, best, start_error, held_error)


def _judged(descent: _Descent, chunks: LayerChunks, start_error: float) -> tuple[int, float]:
    """After how many steps the error on held-out documents is least, and what it is; 0: none."""
    best, held_error, steps = 0, start_error, descent.steps
    judged = {math.ceil(steps * part / JUDGED) for part in range(1, JUDGED + 1)}
    for step in range(1, steps + 1):
        descent.step()
        if step in judged:
            error = _error(descent.weights, descent.activation, chunks)
            if error < held_error:
                best, held_error = step, error
    return best, held_error


class _Descent:
    """Adam over minibatches of some tokens, each seen once before any is seen again."""

    def __init__(
        self,
        start: DenseWeights,
        activation: Activation,
        tokens: LayerTokens,
        steps: int,
        seed: int,
        rate: float,
    ):
        self.activation, self.tokens, self.steps = activation, tokens, steps
        self._parts = [one.clone().requires_grad_() for one in start]
        matrices = (start.gate_WD, start.up_WD, start.columns_WD.T)  # [outputs, inputs]
        self._rates = [rate * _largest_step(one) for one in matrices]
        groups = [{"params": [one]} for one in self._parts]
        self._adam = torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=1e-12)
        self._generator = torch.Generator().manual_seed(seed)
        self._order: Tensor = torch.empty(0, dtype=torch.long)
        self._taken = 0
        square_T = tokens.weight_T * tokens.target_TD.square().sum(dim=1)
        self._square = float(square_T.mean(dtype=torch.float64)) or 1.0

    @property
    def weights(self) -> DenseWeights:
        """As they are now."""
        return DenseWeights(*(one.detach() for one in self._parts))

    def step(self) -> None:
        """One minibatch."""
        share = self._share()
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        some = self._next()
        off_TD = _output(DenseWeights(*self._parts), self.activation, some) - some.target_TD
        loss = (some.weight_T * off_TD.square().sum(dim=1)).mean() / self._square
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()
        self._taken += 1

    def _share(self) -> float:
        """Of the rate: it rises, then falls to zero."""
        warm = max(1.0, WARM_UP * self.steps)
        return min(1.0, (self._taken + 1) / warm) * (1 - self._taken / self.steps)

    def _next(self) -> LayerTokens:
        if len(self._order) < min(TOKENS_OF_A_STEP, len(self.tokens.weight_T)):
            self._order = torch.randperm(len(self.tokens.weight_T), generator=self._generator)
        chosen, self._order = self._order[:TOKENS_OF_A_STEP], self._order[TOKENS_OF_A_STEP:]
        return self.tokens.part(chosen.to(self.tokens.weight_T.device))


def _largest_step(matrix: Tensor) -> float:
    """Of a number of a matrix [outputs, inputs], at a rate of 1."""
    return float(matrix.square().mean().sqrt()) / math.sqrt(matrix.shape[1])


def _output(weights: DenseWeights, activation: Activation, tokens: LayerTokens) -> Tensor:
    """What the layer adds, [T, D]."""
    hidden_TW = activation(tokens.x_TD @ weights.gate_WD.T) * (tokens.x_TD @ weights.up_WD.T)
    return hidden_TW @ weights.columns_WD


@torch.no_grad()
def _error(weights: DenseWeights, activation: Activation, chunks: LayerChunks) -> float:
    """Relative, on the held-out documents."""
    off = square = 0.0
    for one in chunks(True):
        one = _exact(one)
        off_T = (_output(weights, activation, one) - one.target_TD).square().sum(dim=1)
        off += float((one.weight_T * off_T).sum(dtype=torch.float64))
        square_T = one.target_TD.square().sum(dim=1)
        square += float((one.weight_T * square_T).sum(dtype=torch.float64))
    return off / (square or 1.0)


def _exact(one: LayerTokens) -> LayerTokens:
    parts = (one.x_TD.float(), one.target_TD.float(), one.weight_T.float())
    return LayerTokens(*parts, one.held_T)


def _drawn(chunks: LayerChunks, held: bool | None, most: int, seed: int) -> LayerTokens:
    """At most so many tokens, drawn at random where there are more, in order."""
    total = sum(len(one.weight_T) for one in chunks(held))
    kept_T = torch.ones(total, dtype=torch.bool)
    if total > most:
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        kept_T[chosen[most:]] = False
    parts, first = [], 0
    for one in chunks(held):
        kept_t = kept_T[first : first + len(one.weight_T)].to(one.weight_T.device)
        first += len(kept_t)
        parts.append(_exact(one.part(kept_t)))
    return _joined(parts)


def _exact_weights(weights: DenseWeights) -> DenseWeights:
    return DenseWeights(*(one.detach().float() for one in weights))


def _check(weights: DenseWeights) -> None:
    if not all(bool(one.isfinite().all()) for one in weights):
        raise NotFinite(
            "a layer's weights are not finite after its steps: condense.fit_steps=0 leaves it as "
            "the closed form made it"
        )


def _joined(parts: Sequence[LayerTokens]) -> LayerTokens:
    x_TD, target_TD, weight_T, held_T = (
        torch.cat([getattr(one, name) for one in parts])
        for name in ("x_TD", "target_TD", "weight_T", "held_T")
    )
    return LayerTokens(x_TD, target_TD, weight_T, held_T)
