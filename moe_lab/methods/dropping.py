"""What Layer Drop and Block Drop share (He et al. 2406.02500): which layers go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from moe_lab.methods.base import LmHead, Method, Mtp
from moe_lab.methods.layer_choice import check_layers, choose_layers, example_layers
from moe_lab.models.edits.drop_block import DropBlock
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.option import Option
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo


@dataclass(frozen=True)
class Dropping(Method):
    """Drop `num_layers` layers, those whose output is most like their input: 1 - cos is least.

    Means over calibration tokens on the intact model; all layers are chosen at once. Only layers
    with an MoE are candidates. name: the method's; edit: what happens to a layer that goes; cosine:
    "block" or "layer", of which the cosine is taken (`LayerStatistics.mean_cosine`).
    """

    num_layers: Annotated[int, Option("how many layers go, where layers is no list", least=1)]
    layers: Annotated[
        str | Sequence[int],
        Option("cosine: those that change the hidden state least; or a list of decoder layers"),
    ] = "cosine"
    mtp: Mtp = field(default="prune", kw_only=True)
    lm_head: LmHead = field(default="auto", kw_only=True)

    of_condense = ("num_layers", "padding", "convert")
    name: ClassVar[str]
    edit: ClassVar[type[DropLayer | DropBlock]]
    cosine: ClassVar[str]

    @property
    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """What the plan says of its scores."""

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers and numbers that do not exist."""
        super().check(layers)
        check_layers(self.name, self.layers, self.num_layers, ["cosine"], layers)

    def example(self, layers: Sequence[LayerInfo]) -> tuple[DropLayer | DropBlock, ...]:
        """Edits of the shape that the plan will have; of its layers only the number is known."""
        return tuple(
            self.edit(info.index, info.name)
            for info in example_layers(self.layers, self.num_layers, layers)
        )

    def plan(self, profile: Profile) -> Plan:
        """One edit per MoE layer, its score the mean similarity.

        Without scores where layers are named and the family has no such similarity.
        """
        order = choose_layers(self.layers, self.num_layers, profile.statistics, self.cosine)
        edits = tuple(
            (self.edit if one.info.index in order else KeepLayer)(
                one.info.index, one.info.name, scores=self._scores(one)
            )
            for one in profile.statistics
        )
        return Plan(edits, layer_order=order, notes={"statistics": "intact model"} | self.notes)

    def _scores(self, one: LayerStatistics) -> tuple[float, ...]:
        known = one.has_cosine(self.cosine)
        return (one.mean_cosine(self.cosine),) if known else ()
