"""Which documents of a calibration set something is fitted on, and on which others it is judged.

What is judged on the text that it was fitted to looks better than it is, the more so the more
numbers are fitted. Parts are whole documents: tokens of one document are too much alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_lab.types import UserError

ONE_IN = {"chosen": 3, "held out": 4}  # so many documents there is one by which is judged
LEAST = 6  # documents, so that each part has some


def to_fit_and_choose(num_documents: int) -> tuple[list[int], list[int]]:
    """Documents on which candidates are fitted, and others on which one of them is chosen.

    By their places in the calibration set. Raises UserError where there are too few of them.
    """
    check_enough(num_documents)
    places = range(num_documents)
    every = ONE_IN["chosen"]
    return [i for i in places if (i + 1) % every], [i for i in places if not (i + 1) % every]


def held_out(documents: Sequence[int]) -> set[int]:
    """Of documents that something is fitted on, those that decide how strong a ridge is."""
    every = ONE_IN["held out"]
    return {place for number, place in enumerate(sorted(documents), 1) if not number % every}


def check_enough(num_documents: int) -> None:
    """Refuse a calibration set of which no documents are left to judge by."""
    if num_documents < LEAST:
        raise UserError(
            f"the calibration set has {num_documents} documents, and what is fitted on some has to "
            f"be judged on others: at least {LEAST} (calibration.num_samples=64)"
        )
