"""Some experts stay, the others go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_lab.models.edits.base import EditOfExperts
from moe_lab.types import ReplacementName

if TYPE_CHECKING:
    from torch import Tensor

    from moe_lab.models.layers import MoELayer


@dataclass(frozen=True)
class PruneExperts(EditOfExperts):
    """The `kept` experts stay, and the router loses the other rows.

    Or it keeps them, and a token sent to one gets what is put in as a `replacement`: zero, a
    constant vector of the plan's tensors ("layers.<index>.constants" [R, D], of the R removed
    experts in ascending order), or a copy of the token itself, times the router's weight. scores:
    one for each expert, or none.
    """

    replacement: ReplacementName = "nothing"
    scores: tuple[float, ...] = ()

    kind = "prune"
    keeps_experts_as_they_are = True

    @property
    def keeps_rows(self) -> bool:
        """Whether something takes the removed experts' place."""
        return self.replacement != "nothing"

    @property
    def title(self) -> str:
        """With the replacement, where there is one."""
        return f"prune ({self.replacement})" if self.keeps_rows else "prune"

    def to_json(self) -> dict[str, Any]:
        """Without a replacement where there is none."""
        values = super().to_json()
        if not self.keeps_rows:
            del values["replacement"]
        return values

    def keep_with_all_rows(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
        """The rows of the others lead to what replaces them."""
        from moe_lab.models.editing import replace_experts

        replace_experts(layer, self.kept, self.replacement, self._constants(layer, tensors))

    def _constants(self, layer: MoELayer, tensors: Mapping[str, Tensor]) -> Tensor | None:
        from moe_lab.models.editing import constants_name, plan_tensor

        if self.replacement != "constant":
            return None
        from moe_lab.models.layers import experts_size

        reference = layer.experts.down_proj
        shape = layer.info.num_experts - len(self.kept), experts_size(layer.experts)
        if reference.is_meta:
            return reference.new_empty(shape)
        why = f"the plan replaces experts of layer {self.index} by constants"
        return plan_tensor(tensors, constants_name(self.index), shape, why).to(reference)
