"""The numbers of experts per token that somebody gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_lab.methods.skipping.base import SkipRule
from moe_lab.models.edits.base import Edit
from moe_lab.option import word_of
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


class Listed(SkipRule):
    """top_k: one number for all MoE layers, a list with one for each, or {decoder layer: number}.

    Layers that a mapping does not name keep theirs.
    """

    takes = ("top_k",)
    told = "each layer the number of experts per token that was given"

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse numbers that are not there, too many or too large, and layers that are none."""
        super().check(layers)
        for info, number in zip(layers, self._numbers(layers), strict=True):
            if type(number) is not int or not 1 <= number <= info.top_k:
                raise UserError(
                    f"method.top_k={_word(self.options.top_k)}: layer {info.index} chooses "
                    f"{info.top_k} experts for each token, and can choose 1 to {info.top_k}, not "
                    f"{word_of(number)}"
                )

    def _numbers(self, layers: Sequence[LayerInfo]) -> list[int]:
        """One for each MoE layer in order."""
        given: Any = self.options.top_k
        if isinstance(given, Mapping):
            named = {int(key): value for key, value in given.items() if str(key).isdigit()}
            known = {info.index for info in layers}
            if len(named) < len(given) or not named.keys() <= known:
                raise UserError(
                    f"method.top_k={_word(given)} names layers that are none: the model's MoE "
                    f"layers are {sorted(known)} (true indices; dense layers count)"
                )
            return [named.get(info.index, info.top_k) for info in layers]
        if isinstance(given, int):
            return [given] * len(layers)
        if not isinstance(given, Sequence) or len(given) != len(layers):
            raise UserError(
                f"method.top_k={_word(given)}: method.rule=listed needs one number, or one "
                f"for each of the {len(layers)} MoE layers "
                f"({', '.join(str(one.index) for one in layers)}) "
                "as method.top_k=[2,1], or some of them as method.top_k={3: 1}"
            )
        return list(given)

    def passes(self, layers: Sequence[LayerInfo]) -> float:
        """None."""
        return 0.0

    def edits(self, profile: Profile) -> tuple[Edit, ...]:
        """Each layer with its number."""
        return self.example([one.info for one in profile.statistics])

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """The plan itself."""
        numbers = zip(layers, self._numbers(layers), strict=True)
        return tuple(self.fixed(info, number) for info, number in numbers)


def _word(given: Any) -> str:
    if isinstance(given, Mapping):
        return "{" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"
    return word_of(given)
