"""CD-MoE: whole MoE layers become small dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moe_lab.condense import (
    Choice,
    PartlyCondensed,
    Search,
    mean_gates,
    option,
    shared_gate,
)
from moe_lab.methods import Evidence
from moe_lab.moe import check_is_sum, condensed, moe_layers
from moe_lab.progress import progress
from moe_lab.stream import LayerStream
from moe_lab.types import Edit, LayerInfo, Plan, UserError


@dataclass
class Condense:
    """Condense `num_layers` layers to their shared experts and `num_routed` routed ones.

    CD-MoE (2412.00069): num_routed=0 is CD-MoE-S, more is CD-MoE-SR. experts, layers: the name of a
    search in moe_lab/condense/, or an explicit list (experts for every layer alike; true indices
    of decoder layers).
    """

    num_layers: int
    num_routed: int
    experts: str | Sequence[int]
    layers: str | Sequence[int]

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers, experts or searches that do not exist."""
        indices = [info.index for info in layers]
        if isinstance(self.layers, str):
            option("layers", self.layers)
            if not 1 <= self.num_layers <= len(layers):
                raise UserError(
                    f"condense.num_layers={self.num_layers}: the model has {len(layers)} MoE layers"
                )
        elif not self.layers or len(set(self.layers)) < len(self.layers):
            raise UserError(f"condense.layers={list(self.layers)}: name one or more, each once")
        elif unknown := [index for index in self.layers if index not in indices]:
            raise UserError(
                f"condense.layers names {unknown}, but the model's MoE layers are {indices} "
                "(true indices; dense layers count)"
            )
        for info in layers:
            self._check_layer(info)

    def _check_layer(self, info: LayerInfo) -> None:
        if info.obstacle:
            raise UserError(
                f"layer {info.index} cannot become one dense gated MLP: {info.obstacle}; "
                "method=prune works with this family"
            )
        if isinstance(self.experts, str):
            option("experts", self.experts)
            num_routed = self.num_routed
        else:
            num_routed = len(self.experts)
            if len(set(self.experts)) < num_routed:
                raise UserError(f"condense.experts={list(self.experts)}: name each only once")
            if unknown := [e for e in self.experts if not 0 <= e < info.num_experts]:
                raise UserError(
                    f"condense.experts names {unknown}, but layer {info.index} has experts "
                    f"0 to {info.num_experts - 1}"
                )
        if not 0 <= num_routed <= info.num_experts:
            raise UserError(
                f"condense.num_routed={num_routed}: layer {info.index} has {info.num_experts} "
                "routed experts"
            )
        if num_routed == 0 and not info.shared:
            raise UserError(
                f"condense.num_routed=0 (CD-MoE-S) needs shared experts, and layer {info.index} "
                "has none: ask for condense.num_routed of at least 1"
            )

    @torch.no_grad()
    def plan(self, evidence: Evidence) -> Plan:
        """Choose experts for every layer in question, then the layers; one edit per MoE layer."""
        model = evidence.model()
        for layer in moe_layers(model):
            check_is_sum(layer)
        stream = LayerStream(model, evidence.batches())
        search = Search(stream, evidence.statistics)
        edits = self._choose_experts(search)
        chosen = self._choose_layers(stream, edits)
        rest = [edit for edit in edits.values() if edit.index not in chosen.experts]
        keep = [Edit(edit.index, edit.name, "keep") for edit in rest]
        ends = [edits[index] for index in chosen.experts]
        return Plan(
            tuple(sorted([*keep, *ends], key=lambda edit: edit.index)),
            layer_order=chosen.experts,
            layer_divergence=chosen.divergence,
            searched=tuple(rest),
            notes={"statistics": "intact model"},
        )

    def _choose_experts(self, search: Search) -> dict[int, Edit]:
        edits = {}
        for statistics in progress(search.statistics.values(), "condense: choosing experts"):
            index, gates = statistics.info.index, mean_gates(statistics)
            choice = self._experts_of(search, index)
            edits[index] = Edit(
                index,
                statistics.info.name,
                "condense",
                experts=choice.experts,
                gates=tuple(float(gates[expert]) for expert in choice.experts),
                shared_gate=shared_gate(statistics),
                divergence=choice.divergence,
            )
        return edits

    def _experts_of(self, search: Search, index: int) -> Choice:
        if not isinstance(self.experts, str):
            return Choice(tuple(self.experts))
        if self.num_routed == 0:
            return Choice(())
        return option("experts", self.experts)(search.open(index), self.num_routed)

    def _choose_layers(self, stream: LayerStream, edits: dict[int, Edit]) -> Choice:
        if not isinstance(self.layers, str):
            return Choice(tuple(self.layers))
        blocks: dict[int, nn.Module] = {
            index: condensed(stream.moe[index], edit.experts, edit.gates, edit.shared_gate)
            for index, edit in edits.items()
        }
        model = PartlyCondensed(stream, blocks)
        return option("layers", self.layers)(model, self.num_layers)
