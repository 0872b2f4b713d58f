"""What is to be said of an engine's answer, beside what transformers computes in float32."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_lab.report.serving import Verdict

_LONGEST = 240  # characters of a refusal that are told


@dataclass(frozen=True)
class EngineAnswer:
    """What an engine made of a checkpoint.

    top: for each prompt the logprobs of the most probable next tokens; tokens: for each the greedy
    ones; error: in its place, what the engine said; crashed: whether its process ended with that.
    """

    top: list[dict[int, float]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    error: str = ""
    crashed: bool = False

    def to_json(self) -> dict[str, Any]:
        """As an engine's process writes it: `top` as pairs."""
        top = [list(one.items()) for one in self.top]
        return {"top": top, "tokens": self.tokens, "error": self.error}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EngineAnswer:
        """The inverse of `to_json`; crashed is not said there."""
        top = [{int(token): value for token, value in one} for one in values.get("top", ())]
        return cls(top, values.get("tokens", []), values.get("error", ""))


@dataclass(frozen=True)
class Judgement:
    """A verdict with its figures: see `report.serving.Cell`."""

    verdict: Verdict
    difference: float | None = None
    tokens: str = ""
    detail: str = ""


def judged_answer(
    answer: EngineAnswer, reference: dict[str, Tensor], tolerance: float
) -> Judgement:
    """Right where all logprobs are within `tolerance`, and all greedy tokens agree.

    reference: logprobs [P, V] of the next token, greedy tokens [P, T], by how much [P, T] each is
    ahead of the second, and which [P, T] end the text. A token that is not, by more than the
    tolerance allows, ahead of the second may be another one, and what follows it cannot be
    compared; nor what follows the end, at which an engine may stop.
    """
    if answer.error:
        return Judgement("crashed" if answer.crashed else "refused", detail=_line(answer.error))
    difference = _difference(answer.top, reference["logprobs"])
    agreeing, asked, same = 0, 0, len(answer.tokens) == len(reference["tokens"])
    rows = (reference[name] for name in ("tokens", "margins", "ends"))
    for found, tokens_T, margins_T, ends_T in zip(answer.tokens, *rows, strict=False):
        equal = _agreeing(found, tokens_T)
        end = bool(ends_T[max(equal - 1, 0) : equal + 1].any())
        stopped = end and equal == len(found) < len(tokens_T)
        total = equal if stopped else len(tokens_T)
        same = same and (equal == total or float(margins_T[equal]) <= 2 * tolerance)
        agreeing, asked = agreeing + equal, asked + total
    right = same and difference <= tolerance
    return Judgement("right" if right else "silent", difference, f"{agreeing}/{asked}")


def beside_dense(one: Judgement, dense: Judgement) -> Judgement:
    """Not ours, where the engine makes the same of the dense model."""
    same = one.verdict == dense.verdict == "silent"
    return replace(one, verdict="own fault") if same else one


def _difference(top: Sequence[dict[int, float]], logprobs_PV: Tensor) -> float:
    """The largest difference; infinite where the engine says none, or no number."""
    worst = 0.0 if all(top) and len(top) == len(logprobs_PV) else torch.inf
    for found, reference_V in zip(top, logprobs_PV, strict=False):
        for token, value in found.items():
            known = math.isfinite(value) and token < len(reference_V)
            worst = max(worst, abs(value - float(reference_V[token])) if known else torch.inf)
    return worst


def _agreeing(tokens: Sequence[int], reference_T: Tensor) -> int:
    """How many tokens agree before the first that does not."""
    pairs = zip(tokens, reference_T.tolist(), strict=False)
    return next(
        (place for place, (one, other) in enumerate(pairs) if one != other),
        min(len(tokens), len(reference_T)),
    )


def _line(text: str) -> str:
    """The first sentence, in one line."""
    words = re.split(r"\. (?=[A-Z])", " ".join(text.split()))[0]
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
