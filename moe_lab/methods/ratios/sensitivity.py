"""Numbers that add up to the least error, each layer's being measured alone."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from moe_lab.methods.ratios.bits import UNROUNDED, Bits
from moe_lab.methods.ratios.budget import GIB, Budget, Numbers, Scores, best, by_index
from moe_lab.methods.ratios.neurons import Neurons
from moe_lab.methods.ratios.pairs import LayerUnits, Pairs, Shape, least_error
from moe_lab.option import Option, check_options, word_of
from moe_lab.profile import hidden
from moe_lab.profile.all_experts import AllExperts, answers
from moe_lab.profile.intact_predictions import IntactPredictions
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)
ERRORS = ("kl", "output")
POINTS = 8  # how many times a layer is measured, unless ratio.step says otherwise
FINEST = 512  # numbers of hidden units of a layer among which is chosen
EVEN = 1e-13  # of the largest error: of allocations as good as each other the even one is taken


@dataclass(frozen=True)
class Sensitivity(Budget):
    """Take the numbers whose errors have the least sum, found exactly.

    Each layer's error at each number of experts is measured while all other layers are intact, its
    best experts by the metric staying; their sum under the total is minimised by dynamic
    programming. That errors of layers add up is an assumption; the notes have curves and sum.

    error=kl is KL(intact || restricted model) of the next-token distributions, in nats, with one
    forward for each number measured; error=output the squared error of the layer's routed output
    over the output's square, with every expert on every token.
    """

    error: Annotated[
        str, Option("of the model's predictions, or of the layer's output", among=ERRORS)
    ] = "kl"
    num_samples: Annotated[int, Option("first calibration samples, to measure on", least=1)] = 32
    step: Annotated[
        int | None,
        Option("measure where so many more are removed; null: at about eight numbers", least=1),
    ] = None

    bits: Annotated[
        Sequence[int] | None,
        Option(
            "of method.unit=both: numbers of bits among which each layer's is chosen, too, for "
            "quantize=planned; 16: not rounded",
            least=2,
            most=UNROUNDED,
        ),
    ] = None
    group_size: Annotated[
        int | None, Option("of bits: inputs that share a scale, null for all", least=1)
    ] = None

    takes_groups = False

    @property
    def decides_bits(self) -> bool:  # type: ignore[override]  # as its option says
        """Where there are bits among which is chosen."""
        return self.bits is not None

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an impossible budget and unknown options; say what the measuring costs."""
        super().check(layers)
        self.check_something(layers)
        if self.error == "kl":
            multiple = self.stride(layers, FINEST)
            forwards = sum(len(self._measured(info, multiple)) for info in layers)
            logger.info(
                "ratio=sensitivity: %d forwards over %d samples, and one of the intact model",
                forwards, self.num_samples,
            )  # fmt: skip

    def numbers(self, scores: Scores, profile: Profile) -> Numbers:
        """How many experts each layer keeps, by layer index."""
        layers = [info for info, _ in scores]
        multiple = self.stride(layers, FINEST)
        tried = {info.index: self._measured(info, multiple) for info in layers}
        measure = self._divergences if self.error == "kl" else self._output_errors
        errors = measure(scores, tried, profile)
        curves, choices = [], [self.choices(info, multiple)[::-1] for info in layers]
        measured = {}
        for info, some in zip(layers, choices, strict=True):
            points = dict(zip(tried[info.index], errors[info.index], strict=True))
            points |= {info.num_experts: 0.0} if some[0] == info.num_experts else {}
            measured[info.index] = by_index(dict(sorted(points.items(), reverse=True)))
            known = sorted(points)
            curves.append(np.interp(some, known, [points[number] for number in known]))
        removed = -(-(sum(some[0] for some in choices) - self.total(layers)) // multiple)
        taken = least_sum(curves, removed)
        pairs = zip(layers, choices, taken, strict=True)
        numbers = {info.index: some[place] for info, some, place in pairs}
        total = sum(float(curve[place]) for curve, place in zip(curves, taken, strict=True))
        told = {"kept_per_layer": by_index(numbers), "predicted_error": total}
        return Numbers(numbers, told | {"error": self.error, "errors": by_index(measured)})

    def check_pairs(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a budget below what layers of the fewest and narrowest experts take."""
        check_options(self, "ratio")
        if self.error != "kl":
            raise UserError(
                f"ratio.error={self.error}: method.unit=both measures by ratio.error=kl"
            )
        units = [
            self._units(info, torch.empty(info.num_experts, info.expert_width)) for info in layers
        ]
        least = sum(one.least for one in units)
        whole = sum(one.cost(one.whole) for one in units)
        if self.room(layers) < least:
            raise UserError(
                f"{self.asked()}: at least {least / whole:.2%} of the experts' bytes stay with the "
                "fewest experts that the routers work with, as narrow as can be"
                + ", in the fewest bits"
                * (self.bits is not None)
            )
        forwards = sum(len(one.measured) for one in units)
        logger.info(
            "ratio=sensitivity, method.unit=both: %d forwards over %d samples, and one of the "
            "intact model", forwards, self.num_samples,
        )  # fmt: skip

    def pairs(self, scores: Scores, profile: Profile) -> Pairs:
        """How many experts each layer keeps and how wide they stay, by layer index.

        Those with the least sum of errors, each layer's being measured alone at some pairs.
        """
        units = [self._units(info, score_EI) for info, score_EI in scores]
        errors = self._errors_of_pairs(units, profile)
        found, total = least_error(units, errors, self.room([one.info for one in units]))
        told = {
            str(i): {"x".join(map(str, shape)): error for shape, error in some.items()}
            for i, some in errors.items()
        }
        facts: dict[str, Any] = {"predicted_error": total, "error": self.error, "errors": told}
        if self.bits is not None:
            bits = {index: shape[2] for index, shape in found.items()}
            facts["quantize"] = {"bits": by_index(bits), "group_size": self.group_size}
        return Pairs(found, self._told_of(units, found) | facts)

    def _told_of(self, units: Sequence[LayerUnits], pairs: Mapping[int, Shape]) -> dict[str, Any]:
        """What was asked for and is given, of the routed experts' bytes or of the model's."""
        whole = sum(one.cost(one.whole) for one in units)
        gone = whole - sum(one.cost(pairs[one.info.index]) for one in units)
        dropped = sum(one.info.num_experts - pairs[one.info.index][0] for one in units)
        every, model = sum(one.info.num_experts for one in units), units[0].info.model_bytes
        words = f"{dropped} of {every} experts, and {gone / whole:.1%} of all experts' bytes"
        if self.target_gib is not None:
            given = {"target_gib": (model - gone) / GIB, "experts": words}
            return {"asked": {"target_gib": self.target_gib}, "given": given}
        share = gone / (whole if self.of == "experts" else model)
        return {"asked": {"ratio": self.ratio}, "given": {"ratio": share, "experts": words}}

    def room(self, layers: Sequence[LayerInfo]) -> int:
        """How many bytes the routed experts may take."""
        size = sum(info.num_experts * info.expert_bytes for info in layers)
        if self.target_gib is not None:
            return size - layers[0].model_bytes + math.floor(self.target_gib * GIB)
        return math.floor(size * (1 - self._share_of_experts(layers)) + 1e-6)

    def _units(self, info: LayerInfo, score_EI: Tensor) -> LayerUnits:
        """With every number of experts that the router works with, and widths by round_to."""
        width, step = info.expert_width, self.round_to
        widths = sorted({*range(step, width + 1, step), width})
        numbers = self.choices(info, info.groups)
        return LayerUnits(info, score_EI, numbers, widths, self._bits(info))

    def _bits(self, info: LayerInfo) -> Bits | None:
        """Among which bits is chosen; UserError for some that no shape of the layer can have."""
        if self.bits is None:
            return None
        made = Bits(tuple(sorted(set(self.bits))), self.group_size)
        if odd := [bits for bits in made.values if bits > 8 and bits != UNROUNDED]:
            raise UserError(
                f"ratio.bits={word_of(odd)}: there are 2 to 8, and {UNROUNDED} for none"
            )
        if info.hidden_size % (self.group_size or 1):
            raise UserError(
                f"ratio.group_size={self.group_size} does not divide the hidden size "
                f"{info.hidden_size} of layer {info.index}"
            )
        return made

    def _errors_of_pairs(
        self, units: Sequence[LayerUnits], profile: Profile
    ) -> dict[int, dict[Shape, float]]:
        sample = self._sample(profile)

        def measured(one: LayerUnits, tried: list[Shape]) -> list[float]:
            return [sample().divergence({one.info.index: one.cut(shape)}) for shape in tried]

        errors = {}
        for one in progress(list(units), "sensitivity of layers"):
            pairs = one.measured
            question = {
                "question": "divergence with one layer of fewer and narrower experts",
                "pairs": [list(pair) for pair in pairs], "num_samples": self.num_samples,
            } | one.known_by()  # fmt: skip
            work = functools.partial(measured, one, pairs)
            answer = profile.remember(question, work, [IntactPredictions])
            errors[one.info.index] = dict(zip(pairs, answer, strict=True)) | {one.whole: 0.0}
        return errors

    def notes(self, scores: Scores, numbers: Numbers) -> dict[str, Any]:
        """kept_per_layer; errors: by layer and number of experts; predicted_error, their sum."""
        return numbers.found

    def _measured(self, info: LayerInfo, multiple: int) -> list[int]:
        """The numbers of experts at which a layer's error is measured, not where all stay."""
        choices = self.choices(info, multiple)[::-1]
        last = len(choices) - 1
        stride = math.ceil(self.step / multiple if self.step else last / POINTS)
        places = sorted({*range(0, last, max(1, stride)), last})
        return [choices[place] for place in places if choices[place] < info.num_experts]

    def _sample(self, profile: Profile) -> Callable[[], IntactPredictions]:
        """The intact model's predictions, opened once and only where somebody asks."""
        return functools.cache(lambda: IntactPredictions(*profile.open_model(self.num_samples)))

    def _divergences(
        self, scores: Scores, tried: dict[int, list[int]], profile: Profile
    ) -> dict[int, list[float]]:
        sets, sample = _sets(scores, tried), self._sample(profile)

        def errors(index: int) -> list[float]:
            question = {
                "question": "divergence with one layer restricted",
                "layer": index,
                "sets": _known_by(sets[index]),
                "num_samples": self.num_samples,
            }
            return profile.remember(
                question,
                lambda: [sample().divergence({index: kept}) for kept in sets[index]],
                [IntactPredictions],
            )

        return {index: errors(index) for index in progress(list(sets), "sensitivity of layers")}

    def _output_errors(
        self, scores: Scores, tried: dict[int, list[int]], profile: Profile
    ) -> dict[int, list[float]]:
        sets = _sets(scores, tried)
        if isinstance(scores[0][0], Neurons):
            return hidden.output_errors(profile, self.num_samples, sets)

        def errors(experts: AllExperts) -> list[float]:
            return relative_errors(experts, sets[experts.info.index])

        questions = {
            index: {"question": "relative error of the output", "sets": some}
            for index, some in sets.items()
        }
        return answers(profile, self.num_samples, questions, errors, [self])


def _sets(scores: Scores, tried: dict[int, list[int]]) -> dict[int, list[Any]]:
    """What stays of each layer at each number that is tried."""
    return {
        info.index: [_listed(best(info, score, number)) for number in tried[info.index]]
        for info, score in scores
    }


def _listed(kept: Any) -> Any:
    return kept if isinstance(kept, Tensor) else list(kept)


def _known_by(sets: Sequence[Any]) -> list[Any]:
    """Sets as JSON has them; of hidden units what is enough to tell them apart."""
    return [hidden.digest_of(kept) if isinstance(kept, Tensor) else kept for kept in sets]


def relative_errors(experts: AllExperts, sets: Sequence[Sequence[int]]) -> list[float]:
    """sum over tokens of ||F(x; set) - F(x)||^2 / sum of ||F(x)||^2, F the routed output."""
    square = sum(float(chunk.routed_TD.double().square().sum()) for chunk in experts.chunks())
    mean = square / experts.num_tokens
    return [error.mse / mean if mean else 0.0 for error in experts.errors(sets)]


def least_sum(curves: Sequence[np.ndarray], total: int) -> list[int]:
    """A place in each curve, the places adding up to `total`, where the values have the least sum.

    Dynamic programming over the curves and all sums of places up to `total`, which is exact.
    """
    largest = max(float(curve.max()) for curve in curves) or 1.0
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    chosen = []
    for curve in curves:
        places = np.arange(min(len(curve), total + 1))
        table = np.full((len(places), total + 1), np.inf)
        for place in places:
            value = curve[place] + EVEN * largest * place**2
            table[place, place:] = best[: total + 1 - place] + value
        chosen.append(table.argmin(axis=0))
        best = table.min(axis=0)
    steps, rest = [], total
    for column in reversed(chosen):
        steps.append(int(column[rest]))
        rest -= steps[-1]
    return steps[::-1]
