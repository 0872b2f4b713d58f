"""Counts: over the trace, the sequence, or the stay in the cache."""

from __future__ import annotations

from moe_lab.offload.counting import Counted
from moe_lab.offload.demand import Requests


def hits(keys: list[int], sequences: list[int] | None = None, **how: bool) -> list[int]:
    ends = list(range(1, len(keys) + 1))
    asked = Requests(keys, ends, sequences or [0] * len(keys), max(keys) + 1)
    kinds = {"of_sequence": False, "of_residence": False} | how
    return list(Counted(asked, 2, **kinds).hits())


def test_what_counts_begins_anew_as_asked() -> None:
    assert hits([0, 0, 0, 1, 2, 2, 1, 1]) == [0, 1, 1, 0, 0, 1, 0, 1]
    assert hits([0, 0, 0, 1, 2, 2, 1, 1], [0] * 3 + [1] * 5, of_sequence=True) == [
        0, 1, 1, 0, 0, 1, 1, 1
    ]  # fmt: skip
    again = [1, 1, 1, 0, 2, 2, 2, 2, 0, 0, 0, 0, 1, 3, 1, 3, 0]
    assert hits(again)[-1] == 0, "1 was asked for as often as 0, and later"
    assert hits(again, of_residence=True)[-1] == 1, "1 has been fetched just now"
