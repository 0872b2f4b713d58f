"""MoE-Infinity (2401.14361): expert activation matrices that foretell which experts come next.

A collection keeps the matrices of requests that are over. The one most similar to what is known of
the current pass says which experts the layers ahead will need, and which are worth keeping. What
the paper says and what its released code (EfficientMoE/MoE-Infinity d617801) does differ; both are
here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.steered import HIGH, Guide, Pools, Visit, Wanted
from moe_lab.offload.uses import Uses

SMALL, OF_ROWS = 1e-8, 1e-9


def normalised(matrix_LE: np.ndarray) -> np.ndarray:
    """Each row divided by its sum, which 1e-9 keeps from being none."""
    shares: np.ndarray = matrix_LE / (matrix_LE.sum(axis=-1, keepdims=True) + OF_ROWS)
    return shares


class ActivationCollection:
    """The matrices of past requests, at most so many, and how like each is to the current pass.

    cosines: [n, L], of each stored matrix's rows with the current pass's, kept up row by row.
    """

    def __init__(self, layers: int, experts: int, size: int, of_code: bool):
        self.size, self.of_code = size, of_code
        self.stored = np.zeros((0, layers, experts))
        self.cosines = np.zeros((0, layers))
        self.used = np.zeros(0, np.int64)

    def forget_pass(self) -> None:
        """Another pass begins."""
        self.cosines[:] = 0.0

    def see(self, layer: int, row_E: np.ndarray) -> None:
        """What the current pass does in a layer."""
        rows = self.stored[:, layer]
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(row_E)
        self.cosines[:, layer] = rows @ row_E / np.where(lengths > 0, lengths, 1.0)

    def best(self, layer: int) -> np.ndarray | None:
        """The stored matrix [L, E] nearest to the pass so far, rows normalised; None without any.

        Distance is 1 - the mean cosine over the layers seen. The released code zeroes the stored
        rows of exactly these, and is left with layers in which the pass has nothing yet: all
        distances are 1, and the first wins.
        """
        if not len(self.stored):
            return None
        seen = self.cosines[:, layer + 1 :] if self.of_code else self.cosines[:, : layer + 1]
        found = int(np.argmax(seen.sum(axis=1)))
        self.used[found] += 1
        matrix: np.ndarray = self.stored[found]
        return matrix

    def add(self, matrix_LE: np.ndarray) -> None:
        """A request is over. Where all places are taken, it takes that of the most similar one.

        In the released code that of the one that was used least.
        """
        row = normalised(matrix_LE)
        if len(self.stored) < self.size:
            self.stored = np.concatenate([self.stored, row[None]])
            self.cosines = np.concatenate([self.cosines, np.zeros((1, len(row)))])
            self.used = np.append(self.used, 0)
            return
        place = int(np.argmin(self.used) if self.of_code else np.argmax(self._likeness(row)))
        self.stored[place], self.cosines[place], self.used[place] = row, 0.0, 0

    def _likeness(self, row_LE: np.ndarray) -> np.ndarray:
        """Mean cosine over all layers."""
        lengths = np.linalg.norm(self.stored, axis=2) * np.linalg.norm(row_LE, axis=1)
        products = (self.stored * row_LE).sum(axis=2)
        found: np.ndarray = (products / np.where(lengths > 0, lengths, 1.0)).mean(axis=1)
        return found


class ActivationGuide(Guide):
    """Prefetching and eviction by the collection's prediction.

    prefetch priority of expert e in layer l, from layer i: (p + 1e-8) (1 - (l - i) / L), in the
    code (L + 1); p: the stored request's share of the layer's tokens that e had. Of the cache goes,
    by the paper, what has the least (p + 1e-8) (1 - l / L): the least likely, early layers kept
    rather; by the code what was used least since it was fetched.
    """

    def __init__(self, accesses: Accesses, size: int, prefetch: bool, of_code: bool):
        super().__init__(accesses)
        layers, experts = accesses.num_layers, accesses.header.num_experts
        self.layers, self.prefetch, self.of_code = layers, prefetch, of_code
        self.first_L = accesses.first_L
        self.expert_K = np.arange(len(accesses.layer_K)) - self.first_L[accesses.layer_K]
        self.collection = ActivationCollection(layers, experts, size, of_code)
        self.request = np.zeros((layers, experts))
        self.uses = Uses(len(accesses.layer_K))
        self.residence = np.zeros(len(accesses.layer_K), np.int64)
        self.sequence = 0
        self.shares_K = np.zeros(len(accesses.layer_K))

    def see(self, visit: Visit) -> None:
        """Take in what the layer needs, and look for the request that it is like."""
        if visit.sequence != self.sequence:
            self.sequence = visit.sequence
            self.collection.add(self.request)
            self.request[:] = 0.0
        if visit.layer == 0:
            self.collection.forget_pass()
        row_E = np.zeros(self.request.shape[1])
        row_E[self.expert_K[visit.keys]] = visit.counts
        self.request[visit.layer] += row_E
        self.collection.see(visit.layer, row_E)
        self.uses.add(visit)
        self.residence[visit.keys] += 1
        matrix = self.collection.best(visit.layer)
        layer_K = self.accesses.layer_K
        self.shares_K = self.shares_K if matrix is None else matrix[layer_K, self.expert_K]

    def wanted(self, visit: Visit, pools: Pools) -> Wanted:
        """Every expert of the layers ahead that the request it is like needed, likeliest first."""
        if not self.prefetch:
            return ()
        return self._ahead(visit)

    def _ahead(self, visit: Visit) -> Iterator[tuple[int, int]]:
        if visit.layer + 1 == self.layers:
            return
        begin = int(self.first_L[visit.layer + 1])
        shares = self.shares_K[begin:]
        distance = self.accesses.layer_K[begin:] - visit.layer
        nearness = 1 - distance / (self.layers + self.of_code)
        priority = np.where(shares > 0, (shares + SMALL) * nearness, 0.0)
        for key in np.argsort(-priority, kind="stable").tolist():
            if priority[key] <= 0:
                return
            yield begin + key, HIGH

    def priorities(self, visit: Visit, keys: np.ndarray) -> np.ndarray:
        """What is worth keeping; of several alike what was used last."""
        recency = self.uses.last[keys] / (self.uses.now + 1)
        if self.of_code:
            kept: np.ndarray = self.residence[keys] + recency
            return kept
        kept = (self.shares_K[keys] + SMALL) * (1 - self.accesses.layer_K[keys] / self.layers)
        kept += 1e-12 * recency
        return kept

    def evicted(self, key: int) -> None:
        """Its uses since it was fetched are over."""
        self.residence[key] = 0
