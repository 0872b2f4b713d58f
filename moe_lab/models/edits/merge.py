"""Several experts become one, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import EditOfExperts, Fate
from moe_lab.types import AlignName, RouterName

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moe_lab.models.layers import MoELayer, Standing


@dataclass(frozen=True)
class MergeExperts(EditOfExperts):
    """kept[i] becomes the average of the experts groups[i], itself among them, with weights[i].

    Before that `align` has matched their hidden units to its own: by their weights, or as the
    plan's tensor "layers.<index>.permutation" [E, I] says, which was found from activations or
    both. router: all rows stay and lead to the merged experts (M-SMoE 2310.01334, HC-SMoE
    2410.08589), which a stock model cannot say; else a group keeps one row, that of the expert
    that stays (dominant), or the weighted mean (mean) or sum (sum) of its rows, with its entries of
    the router's biases alike. scores: one for each expert, or none.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    align: AlignName = "weights"
    router: RouterName = "dominant"
    scores: tuple[float, ...] = ()

    kind = "merge"
    gone = "merged away"
    joined = ("others merged into it", "experts merged into it")

    @property
    def keeps_rows(self) -> bool:
        """Whether all router rows stay."""
        return self.router == "all"

    @property
    def into(self) -> dict[int, int]:
        """The expert that stays of each one's group."""
        groups = zip(self.kept, self.groups, strict=False)
        return {expert: kept for kept, group in groups for expert in group if expert != kept}

    def keep_with_all_rows(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
        """The rows of each group lead to the expert that stays."""
        from moe_lab.models.editing import share_experts

        share_experts(layer, self.kept, self.groups)

    def apply(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Average the experts of each group, and its router rows where asked; the others go."""
        from moe_lab.models.editing import merge_router_rows
        from moe_lab.models.merging import merge_experts

        layer = self.own_layer(standing)
        permutation_EI = self._permutation(layer, tensors)
        merge_experts(
            layer.experts, self.kept, self.groups, self.weights, self.align, permutation_EI
        )
        if self.router in ("mean", "sum"):
            weights = self.weights if self.router == "mean" else None
            merge_router_rows(layer, self.kept, self.groups, weights)
        return self.restructure(standing, tensors)

    def _permutation(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> Tensor | None:
        from moe_lab.models.editing import plan_tensor
        from moe_lab.models.merging import permutation_name

        if self.align in ("none", "weights"):
            return None
        shape = layer.info.num_experts, layer.info.expert_width
        why = f"the plan merges experts of layer {self.index} with align={self.align}"
        return plan_tensor(tensors, permutation_name(self.index), shape, why)

    @property
    def cells(self) -> dict[str, list[Any]]:
        """The groups of more than one."""
        merged = ["+".join(map(str, group)) for group in self.groups if len(group) > 1]
        return {"groups merged": merged}

    @property
    def named_experts(self) -> tuple[int, ...]:
        """Those that stay, and all of the groups."""
        return (*self.kept, *(expert for group in self.groups for expert in group))

    def fate(self, expert: int) -> Fate:
        """Kept alone, joined by others, or merged into another."""
        for kept, group in zip(self.kept, self.groups, strict=False):
            if expert == kept:
                return Fate("joined" if len(group) > 1 else "kept", len(group))
            if expert in group:
                return Fate("removed", into=kept)
        return super().fate(expert)
