"""How much longer fine-tuning made an expert's row of the router."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from moe_lab.methods.metrics.base import Metric
from moe_lab.models.checkpoint import Checkpoint, resolve
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import routers_only
from moe_lab.option import Option
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.weights import router_row_norms
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class RouterNormChange(Metric):
    """The change of each expert's router norm from a pre-trained to the fine-tuned model [E].

    2405.16646 (ICML 2024): Delta_s = ||w_s^(T)||_2 - ||w_s^(0)||_2, w_s the router's row of expert
    s after fine-tuning (the model of the run) and before it (`reference`); experts with the
    smallest change go first. No calibration text enters it.
    """

    reference: Annotated[
        str | None, Option("the model before fine-tuning: a folder or a hub id")
    ] = None

    from_routers = True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse a reference that is no checkpoint, or whose MoE layers are not like `layers`."""
        theirs = {info.index: info for info in self.checkpoint.layers()}
        ours = {info.index: info for info in layers}
        who = f"metric.reference={self.reference} (a {self.checkpoint.config.model_type!r})"
        why = "the norm's change can only be taken between two checkpoints of one architecture"
        if ours.keys() != theirs.keys():
            raise UserError(
                f"{who} has MoE layers {sorted(theirs)}, the model {sorted(ours)}: {why}"
            )
        for index, our in ours.items():
            if theirs[index].family != our.family:
                raise UserError(f"{who} is of another family than the model, {our.family!r}: {why}")
            for field, words in (("num_experts", "experts"), ("hidden_size", "hidden units")):
                their_value, wanted = getattr(theirs[index], field), getattr(our, field)
                if their_value != wanted:
                    raise UserError(
                        f"{who} has {their_value} {words} in layer {index}, the model {wanted}: "
                        f"{why}"
                    )

    def score(self, layer: LayerStatistics) -> Tensor:
        """The change of each row's norm."""
        return layer["router_norm"] - self._norms[layer.info.index]

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with the reference's content in the place of its path."""
        others = {name: value for name, value in options.items() if name != "reference"}
        return others | {"fingerprint": self.checkpoint.fingerprint}

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The reference; UserError where there is none."""
        if self.reference is None:
            raise UserError(
                "metric=router_norm_change compares with the model before fine-tuning: give it "
                "with metric.reference=<folder or hub id>"
            )
        try:
            return resolve(self.reference)
        except UserError as error:
            raise UserError(f"metric.reference: {error}") from error

    @functools.cached_property
    def _norms(self) -> dict[int, Tensor]:
        layers = moe_layers(routers_only(self.checkpoint))
        return {layer.info.index: router_row_norms(layer) for layer in layers}
