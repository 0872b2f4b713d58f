"""What came of a check, and how large a difference is one."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moe_lab.files import PACKAGE
from moe_lab.types import UserError

OutcomeState = Literal[
    "stock", "own", "yes", "refused", "fault", "silent", "none", "not reached", "not built"
]
BAD = ("fault", "silent")
# Largest differences of logits, as shares of the largest logit: a checkpoint holds the model
# exactly; a reference adds up the same terms in another order.
RELOADED, OF_REFERENCE, EFFECT, SAME_SUMS = 1e-6, 1e-4, 1e-6, 1e-5


@dataclass(frozen=True)
class Outcome:
    """What came of a check, and in words why or how far.

    stock, own: it works, and the result is of the family's own form or ours. yes: it works, where
    nothing is saved. none: there is nothing to check. refused: a UserError says why not. silent: a
    wrong result without a word. fault: anything else that went wrong. unchecked: why no reference
    could be computed.
    """

    state: OutcomeState
    detail: str = ""
    unchecked: str = ""


def told(error: BaseException) -> Outcome:
    """A refusal with its sentence, or a fault with the line of ours where it came up."""
    words = " ".join(str(error).split())
    if isinstance(error, UserError):
        return Outcome("refused", words)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if Path(one.filename).is_relative_to(PACKAGE)]
    inside = [one for one in ours if "families" not in Path(one.filename).parent.name] or ours
    where = f"{Path(inside[-1].filename).name}, {inside[-1].name}" if inside else "outside moe_lab"
    return Outcome("fault", f"{type(error).__name__}: {words[:200]} ({where})")


def difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest of `others`; infinite between shapes."""
    worst = 0.0
    for one, other in zip(some, others, strict=True):
        if one.shape != other.shape or not bool(one.isfinite().all()):
            return torch.inf
        largest = other.double().abs().max().clamp(min=1e-9)
        worst = max(worst, float((one.double() - other.double()).abs().max() / largest))
    return worst
