"""Numbers that somebody wrote down."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moe_lab.methods.ratios.budget import Ratio, Scores, floor_of
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import check_kept
from moe_lab.option import Option
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Listed(Ratio):
    """Keep as many experts as are listed."""

    kept: Annotated[
        Sequence[int] | Mapping[int, int] | None,
        Option("a number for each MoE layer in order; or {3:4}: of layer 3, the others keep all"),
    ] = None
    plan: Annotated[
        str | None, Option("in the place of kept: a plan.json, whose numbers are taken")
    ] = None

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a list of the wrong length, unknown layers and impossible numbers."""
        super().check(layers)
        self._of(layers)

    def numbers(self, scores: Scores, profile: Profile) -> dict[int, int]:
        """How many experts each layer keeps, by layer index."""
        return self._of([info for info, _ in scores])

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers, wherever they were written."""
        listed, numbers = self._listed, None
        if isinstance(listed, Mapping):
            numbers = {str(index): number for index, number in sorted(listed.items())}
        others = {name: options[name] for name in options if name != "plan"}
        return others | {"kept": listed if numbers is None else numbers}

    @functools.cached_property
    def _listed(self) -> Sequence[int] | Mapping[int, int]:
        if self.kept is not None and self.plan is None:
            return self.kept
        if self.kept is None and self.plan is not None:
            return _numbers_of(self.plan)
        raise UserError(
            "ratio=listed needs one of ratio.kept=[6,4,8] (the experts that each MoE layer "
            "keeps), ratio.kept={3:4} (those of layer 3; the others keep all) or "
            "ratio.plan=<a plan.json>"
        )

    def _of(self, layers: Sequence[LayerInfo]) -> dict[int, int]:
        source = f"ratio.plan={self.plan}" if self.plan else f"ratio.kept={_word(self.kept)}"
        if self.plan and layers[0].items != "experts":
            raise UserError(
                f"{source}: its layers keep numbers of experts, and here hidden units go: "
                "ratio.kept=[80,64] lists how many of them each layer keeps"
            )
        everything, listed = {info.index: info.num_experts for info in layers}, self._listed
        if isinstance(listed, Mapping):
            if unknown := sorted(set(listed) - set(everything), key=str):
                raise UserError(
                    f"{source}: {unknown[0]} is no MoE layer; they are {sorted(everything)}"
                )
        elif len(listed) != len(layers):
            raise UserError(
                f"{source}: {len(listed)} numbers for {len(layers)} MoE layers, which are "
                f"{sorted(everything)}; ratio.kept={{{layers[0].index}:4}} names some of them"
            )
        else:
            listed = dict(zip(everything, listed, strict=True))
        for info in layers:
            _check_number(info, listed.get(info.index, info.num_experts), source)
        return everything | dict(listed)


def _check_number(info: LayerInfo, number: int, source: str) -> None:
    if type(number) is not int or number > info.num_experts:
        raise UserError(
            f"{source}: layer {info.index} has {info.num_experts} {info.items} and can keep "
            f"{floor_of(info, None)} to {info.num_experts} of them, not {number!r}"
        )
    try:
        check_kept(info, number)
    except UserError as error:
        raise UserError(
            f"{source}: {error}. It can keep {floor_of(info, None)} to {info.num_experts}"
        ) from error


def _numbers_of(path: str) -> dict[int, int]:
    """The experts that the layers of a plan keep; layers that it does not change are left out."""
    try:
        chains = Plan.load(Path(path)).chains()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"ratio.plan={path} cannot be read as a plan: {error!r}") from error
    numbers = {}
    for chain in (chain for chain in chains if chain.changes):
        if chain.num_experts_left is None:
            raise UserError(
                f"ratio.plan={path}: its layer {chain.index} ends as {chain.edits[-1].kind!r}, "
                "which is no number of experts; a plan of method=prune or method=merge has them"
            )
        numbers[chain.index] = chain.num_experts_left
    return numbers


def _word(kept: Sequence[int] | Mapping[int, int] | None) -> str:
    """As it was asked for."""
    if isinstance(kept, Mapping):
        return "{" + ",".join(f"{index}:{number}" for index, number in kept.items()) + "}"
    return "[" + ",".join(map(str, kept or ())) + "]"
