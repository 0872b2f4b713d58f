"""An interpolated trigram model over tokens, the yardstick of the reference model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

WEIGHT_STEPS = 10  # interpolation weights are searched in steps of a tenth


class Trigram:
    """Trigram, bigram, unigram and uniform probabilities mixed with fixed weights.

    Counts of a domain are scaled to its share of training, since the model it is compared with
    sees domains in those proportions and not in the proportions of their sizes.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.batches: list[tuple[Tensor, float]] = []

    def add(self, rows: Tensor, share: float) -> None:
        """Count rows [count, length] so that they weigh `share` in total."""
        self.batches.append((rows, share))

    def losses(self, held_out: dict[str, Tensor]) -> dict[str, float]:
        """Nats per token on held-out rows [count, length] by name, all but the first predicted.

        The weights are chosen per name on these same rows, in the trigram's favour.
        """
        orders = [self._table(order) for order in (1, 2, 3)]
        contexts = [None, *(self._contexts(order) for order in (2, 3))]
        found = {}
        for name, rows in held_out.items():
            grams = self._grams(rows, 3)
            probabilities = [torch.full((len(grams),), 1 / self.vocabulary, dtype=torch.double)]
            for order in (1, 2, 3):
                joint = _look_up(orders[order - 1], self._keys(grams, order))
                if order == 1:
                    given = torch.ones_like(joint) * orders[0][1].sum()
                else:
                    given = _look_up(contexts[order - 1], self._keys(grams[:, :-1], order - 1))
                probabilities.append(torch.where(given > 0, joint / given.clamp_min(1e-30), 0.0))
            found[name] = _best(torch.stack(probabilities))
        return found

    def _grams(self, rows: Tensor, order: int) -> Tensor:
        """Every window of `order` tokens ending at a predicted token; the start repeats."""
        padded = torch.cat((rows[:, :1].repeat(1, order - 2), rows), dim=1)
        return padded.unfold(1, order, 1).reshape(-1, order)

    def _keys(self, grams: Tensor, order: int) -> Tensor:
        """One number for the last `order` tokens of every window."""
        keys = torch.zeros(len(grams), dtype=torch.long)
        for column in grams[:, grams.size(1) - order :].unbind(1):
            keys = keys * self.vocabulary + column
        return keys

    def _table(self, order: int) -> tuple[Tensor, Tensor]:
        return self._weighted(lambda grams: self._keys(grams, order))

    def _contexts(self, order: int) -> tuple[Tensor, Tensor]:
        return self._weighted(lambda grams: self._keys(grams[:, :-1], order - 1))

    def _weighted(self, keys_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Sorted keys and their weights over all domains."""
        keys, weights = [], []
        for rows, share in self.batches:
            unique, counts = keys_of(self._grams(rows, 3)).unique(return_counts=True)
            keys.append(unique)
            weights.append(counts.double() * share / counts.sum())
        unique, inverse = torch.cat(keys).unique(return_inverse=True)
        total = torch.zeros(len(unique), dtype=torch.double)
        return unique, total.index_add_(0, inverse, torch.cat(weights))


def _look_up(table: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
    places = torch.searchsorted(table[0], keys).clamp_max(len(table[0]) - 1)
    return torch.where(table[0][places] == keys, table[1][places], 0.0)


def _best(probabilities: Tensor) -> float:
    """Least mean negative logarithm over mixtures of the rows of [orders, tokens]."""
    best = float("inf")
    for cuts in itertools.product(range(1, WEIGHT_STEPS), repeat=2):
        bigram, trigram = (cut / WEIGHT_STEPS for cut in cuts)
        lower = 0.9 * probabilities[1] + 0.1 * probabilities[0]
        middle = bigram * probabilities[2] + (1 - bigram) * lower
        mixed = trigram * probabilities[3] + (1 - trigram) * middle
        best = min(best, -mixed.log().mean().item())
    return best
