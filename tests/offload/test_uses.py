"""What is remembered of each expert."""

from __future__ import annotations

import numpy as np

from moe_lab.offload.steered import Visit
from moe_lab.offload.uses import Uses


def test_counts_are_of_the_sequence_and_ages_of_all() -> None:
    uses, nothing = Uses(4), np.zeros(2)
    uses.add(Visit(0, 0, 0, np.array([2, 0]), nothing, nothing), np.array([True, False]))
    uses.add(Visit(1, 1, 0, np.array([2, 3]), nothing, nothing))
    assert uses.count.tolist() == [1, 0, 2, 1] and uses.high.tolist() == [0, 0, 2, 1]
    assert uses.last.tolist() == [2, 0, 3, 4] and uses.now == 4
    uses.add(Visit(2, 0, 1, np.array([1, 0]), nothing, nothing))
    assert uses.count.tolist() == [1, 1, 0, 0] and uses.last.tolist() == [6, 5, 3, 4]
