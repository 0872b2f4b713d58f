"""Fewer experts per token, without training: routing changes, and no weight.

Which of a token's experts stay is said by a rule (`skipping/`, a file each).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.lookup import named
from moe_lab.methods.base import Method
from moe_lab.methods.skipping.base import SKIPPING_FILES, SkipOptions, SkipRule
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.skip import SkipExperts
from moe_lab.models.edits.top_k import SetTopK
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skip(SkipOptions, Method):
    """Every expert stays, and a token gets fewer of them.

    That saves compute. What a memory-bound decoding step costs depends on how many different
    experts a batch needs (routing/distinct_experts_<batch> in reports), which falls by less.
    """

    unforeseen = (
        "how many experts a token gets in each layer is known with the plan: where layers differ, "
        "the result is saved in moe_lab's own form, which stock transformers cannot load"
    )

    from_routers = True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a rule that does not exist, and what it refuses."""
        super().check(layers)
        self._rule.check(layers)

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Edits of the kind that the rule makes."""
        return self._rule.example(layers)

    def foresees_form(self, layers: Sequence[LayerInfo]) -> bool:
        """Not where layers may come to differ."""
        return self._rule.foresees_form()

    def foreseen(self, layers: Sequence[LayerInfo]) -> Mapping[int, int]:
        """All experts stay."""
        return {info.index: info.num_experts for info in layers}

    def passes(self, layers: Sequence[LayerInfo]) -> float:
        """What finding the plan takes, in passes of the calibration text through the model."""
        return self._rule.passes(layers)

    def parts(self) -> Sequence[object]:
        """The rule."""
        return [type(self._rule)]

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, without the seed where nothing is drawn."""
        drawn = "inputs" in self._rule.takes and self._rule.option("inputs") == "random"
        return {name: value for name, value in options.items() if name != "seed" or drawn}

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that are given; numbers by layer as text."""
        told = super().settings(options)
        if isinstance(numbers := options.get("top_k"), Mapping):
            told["top_k"] = ", ".join(f"{index}: {number}" for index, number in numbers.items())
        return told

    @property
    def _rule(self) -> SkipRule:
        package, *bases = SKIPPING_FILES
        made: type[SkipRule] = named("method.rule", self.rule, package, SkipRule, bases)
        return made(self)

    def plan(self, profile: Profile) -> Plan:
        """One edit for each MoE layer, of which those that change nothing say so."""
        rule = self._rule
        edits = rule.edits(profile)
        infos = [one.info for one in profile.statistics]
        numbers = [_experts_per_token(edit) for edit in edits]
        before = sum(info.top_k for info in infos) / len(infos)
        given = sum(numbers) / len(numbers)
        logger.info(
            "skip: %.3g of %.3g experts per token are left on average, by layer %s",
            given, before, ", ".join(f"{number:.3g}" for number in numbers),
        )  # fmt: skip
        share = {"experts_per_token": given, "share_of_routed_compute": given / before}
        return Plan(edits, notes={"statistics": "intact model"} | rule.notes() | share)


def _experts_per_token(edit: Edit) -> float:
    if isinstance(edit, SetTopK):
        return float(edit.top_k)
    assert isinstance(edit, SkipExperts)
    return float(edit.value if edit.mean is None else edit.mean)
