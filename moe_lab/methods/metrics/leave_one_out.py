"""What a layer's output loses with one expert, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.profile import all_experts
from moe_lab.profile.all_experts import AllExperts, as_json, check_num_samples
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

MEASURES = ("mse", "cosine")


@dataclass(frozen=True)
class LeaveOneOut:
    """The change of a layer's output where the router is without one expert, for each [E].

    s_j = mean over tokens of d(F(x), F(x; all but j)), F the routed output; `measure`: d is the
    squared error summed over hidden units (mse), or 1 - cos (cosine). The router works as if the
    expert had been pruned: another one moves up into the choice, and the weights are made anew.
    Where it works on groups, the expert's logit and bias are -inf, and its group is ranked by the
    others; so that of two experts in a group the other is never chosen.

    Every expert is computed on every token of the first `num_samples` documents of the calibration
    set (null: all of them).
    """

    measure: str = "mse"
    num_samples: int | None = 32

    takes_groups = False

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an unknown measure, no documents, and layers that need all their experts."""
        if self.measure not in MEASURES:
            raise UserError(f"metric.measure={self.measure}: there are {', '.join(MEASURES)}")
        check_num_samples("leave_one_out", self.num_samples)
        for info in layers:
            if info.num_experts <= info.top_k:
                raise UserError(
                    f"metric=leave_one_out: layer {info.index} has {info.num_experts} experts and "
                    f"its router chooses {info.top_k} for each token, so that none can be left out"
                )

    def scores(self, profile: Profile) -> list[Tensor]:
        """For each layer in order."""
        indices = [layer.info.index for layer in profile.statistics]
        questions = {index: {"question": "leave_one_out"} for index in indices}
        answers = all_experts.answers(profile, self.num_samples, questions, left_out, [self])
        return [
            torch.tensor([error[self.measure] for error in answers[index]], dtype=torch.float64)
            for index in indices
        ]

    def code(self) -> list[object]:
        """What decides the scores beside this class."""
        return [all_experts, *all_experts.CODE]


def left_out(experts: AllExperts) -> list[dict[str, float]]:
    """The error of the layer without each of its experts in turn."""
    everyone = range(experts.info.num_experts)
    return as_json(experts.errors([[one for one in everyone if one != gone] for gone in everyone]))
