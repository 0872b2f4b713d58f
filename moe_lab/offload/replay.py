"""What a policy made of a trace: hits, misses, bytes, seconds, prefill and decoding apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_lab.offload.accesses import Accesses

MISS, HIT, LOW_MISS, LOW_HIT, LATE, SKIPPED = range(6)
OUTCOME_WORDS = {
    HIT: "hits", MISS: "misses", LOW_HIT: "low_hits", LOW_MISS: "low_misses", LATE: "late",
    SKIPPED: "skipped",
}  # fmt: skip


@dataclass(frozen=True)
class Replayed:
    """The outcome of each access and what each visit cost.

    outcome_A: HIT (there when its layer came), MISS (fetched while the layer waited), LATE (on its
    way already), LOW_HIT and LOW_MISS (the same in low precision), SKIPPED (not computed).
    moved_V: bytes that came over the link, prefetched ones counted where they were asked for;
    seconds_V: computing and waiting. most: experts in the cache at once, at most.
    """

    accesses: Accesses
    outcome_A: np.ndarray
    moved_V: np.ndarray
    seconds_V: np.ndarray
    most: int

    def figures(self) -> dict[str, float]:
        """Flat figures, those of each phase after its name.

        hit_rate: of all accesses that were not skipped; seconds_per_token and bytes_per_token: over
        the tokens that the passes of a phase took in.
        """
        told: dict[str, float] = {}
        for phase, inside_V in (("prefill", ~self.accesses.decode_V),
                                ("decode", self.accesses.decode_V)):  # fmt: skip
            told |= {f"{phase}/{name}": value for name, value in self._of(inside_V).items()}
        return told | {"occupancy": self.most}

    def _of(self, inside_V: np.ndarray) -> dict[str, float]:
        outcome = self.outcome_A[inside_V[self.accesses.visit_A]]
        counts = np.bincount(outcome, minlength=len(OUTCOME_WORDS))
        first = self.accesses.layer_V == 0
        tokens = int(self.accesses.tokens_V[inside_V & first].sum())
        asked = len(outcome) - int(counts[SKIPPED])
        found = int(counts[HIT] + counts[LOW_HIT])
        moved, seconds = float(self.moved_V[inside_V].sum()), float(self.seconds_V[inside_V].sum())
        return {
            "tokens": tokens,
            "accesses": len(outcome),
            **{word: int(counts[kind]) for kind, word in OUTCOME_WORDS.items()},
            "hit_rate": found / asked if asked else 0.0,
            "bytes": moved,
            "bytes_per_token": moved / tokens if tokens else 0.0,
            "seconds": seconds,
            "seconds_per_token": seconds / tokens if tokens else 0.0,
        }
