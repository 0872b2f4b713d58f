"""What a layer's output loses with one expert, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.metrics.base import Metric
from moe_lab.option import Option
from moe_lab.profile.all_experts import AllExperts, answers, as_json
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError

MEASURES = ("mse", "cosine")


@dataclass(frozen=True)
class LeaveOneOut(Metric):
    """The change of a layer's output where the router is without one expert, for each [E].

    s_j = mean over tokens of d(F(x), F(x; all but j)), F the routed output and d the
    `measure`. The router works as if the expert had been pruned: another one moves up into the
    choice, and the weights are made anew.
    Where it works on groups, the expert's logit and bias are -inf, and its group is ranked by the
    others; so that of two experts in a group the other is never chosen.

    Every expert is computed on every token of the sample.
    """

    measure: Annotated[
        str,
        Option("mse: squared error, summed over hidden units; cosine: 1 - cos", among=MEASURES),
    ] = "mse"
    num_samples: Annotated[
        int | None, Option("first documents of the calibration set; null: all", least=1)
    ] = 32

    needs_model = True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse an unknown measure, no documents, and layers that need all their experts."""
        super().check(layers)
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
        errors = answers(profile, self.num_samples, questions, left_out, [self])
        return [
            torch.tensor([error[self.measure] for error in errors[index]], dtype=torch.float64)
            for index in indices
        ]


def left_out(experts: AllExperts) -> list[dict[str, float]]:
    """The error of the layer without each of its experts in turn."""
    everyone = range(experts.info.num_experts)
    return as_json(experts.errors([[one for one in everyone if one != gone] for gone in everyone]))
