"""A rule leaves out some of a token's experts: the router still chooses as many as ever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import Edit
from moe_lab.types import SkipName, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import Standing
    from moe_lab.models.skip_rules import Skipping


@dataclass(frozen=True)
class SkipExperts(Edit):
    """Of the experts that the router chose for a token those stay that a rule leaves.

    rule, value, renormalize, scoring: as of `skip_rules.Skipping`. mean: how many a token has on
    average on the calibration text, None where that was not looked at.
    """

    rule: SkipName = "first"
    value: float = 1.0
    renormalize: bool = True
    scoring: str | None = None
    mean: float | None = None

    kind = "skip"
    keeps_experts_as_they_are = True
    trains = "experts"

    def to_json(self) -> dict[str, Any]:
        """Without what is not there."""
        values = super().to_json()
        return {name: value for name, value in values.items() if value is not None}

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The same block, whose router has the rule; UserError where it cannot have one."""
        from moe_lab.models.skipping import skip

        layer = self.moe_layer(standing)
        skip(layer, self._rule)
        return layer.block

    @property
    def _rule(self) -> Skipping:
        from moe_lab.models.skip_rules import Skipping

        return Skipping(self.rule, self.value, self.renormalize, self.scoring)

    @classmethod
    def written(cls, standing: Standing) -> dict[str, Any] | None:
        """The rule of a layer that has one."""
        from moe_lab.models.layers import MoELayer
        from moe_lab.models.skip_rules import rule_of

        rule = rule_of(standing) if isinstance(standing, MoELayer) else None
        if rule is None:
            return None
        said = {"rule": rule.rule, "value": rule.value, "renormalize": rule.renormalize}
        return said | ({"scoring": rule.scoring} if rule.scoring else {})

    @classmethod
    def replay(cls, standing: Standing, written: dict[str, Any]) -> nn.Module:
        """The block whose router has the rule that was written down."""
        from moe_lab.models.layers import MoELayer
        from moe_lab.models.skip_rules import Skipping
        from moe_lab.models.skipping import skip

        assert isinstance(standing, MoELayer)
        try:
            rule = Skipping(**written)
        except TypeError as error:
            raise UserError(
                f"layer {standing.info.index}: the rule {written} of this checkpoint is none: it "
                "has a rule, its value, renormalize and, of some, scoring"
            ) from error
        skip(standing, rule)
        return standing.block

    @property
    def title(self) -> str:
        """The kind, with its rule."""
        return f"skip ({self.rule})"

    @property
    def cells(self) -> dict[str, list[Any]]:
        """The rule and its number, and how many experts a token has."""
        told: dict[str, list[Any]] = {"rule": [f"{self.rule} {self.value:.4g}"]}
        if self.mean is not None:
            told["experts per token"] = [round(self.mean, 3)]
        return told
