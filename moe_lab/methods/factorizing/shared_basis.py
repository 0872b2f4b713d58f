"""One basis for all experts of a layer, and each expert's coefficients in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moe_lab.methods.factorizing.base import ExpertMatrices, Fitted, refuse_rank
from moe_lab.methods.factorizing.low_rank import shared_left, shared_right
from moe_lab.methods.factorizing.whitening import Whitening
from moe_lab.models.factors import Spec, StackShape
from moe_lab.option import Option

SIDES = ("state", "inputs")


@dataclass(frozen=True)
class SharedBasis(Whitening):
    """Ours: W_e = L_e V with one V [R, N] for gate and one for up; of least error, in closed form.

    side=state: down projections have the basis on the side of the model's state, too, which all
    experts have in common: W_e = U V_e, U [O, R]. inputs: they have it on the side of their inputs,
    whose hidden units are each expert's own. Where bases are of inputs, one covariance stands for
    all experts (their sum), and experts count by how often they are chosen.
    """

    side: Annotated[
        str, Option("where down projections share: the model's state, or their inputs", among=SIDES)
    ] = "state"

    def spec(self, matrix: str, shape: StackShape, budget: int) -> Spec:
        """The largest rank of the one basis."""
        number, outputs, inputs = shape
        shared = "left" if matrix == "down" and self.side == "state" else "right"
        own, common = (inputs, outputs) if shared == "left" else (outputs, inputs)
        each = number * own + common
        if budget < each:
            raise refuse_rank(matrix, shape, budget, each)
        rank = min(budget // each, common, number * own)
        return {"kind": "low_rank", "rank": rank, "shared": shared}

    def fit(self, matrices: ExpertMatrices, spec: Spec, budget: int) -> Fitted:
        """Exact, given the covariances."""
        weight_EON = matrices.weight
        if spec["shared"] == "left":
            covariances = self.covariances(matrices, together=True)
            left_OR, right_ERN = shared_left(weight_EON, covariances, spec["rank"])
            return Fitted(spec, {"left": left_OR, "right": right_ERN})
        share_E = matrices.count if self.whiten else None
        pooled_NN = self.pooled(matrices)
        left_EOR, right_RN = shared_right(weight_EON, pooled_NN, share_E, spec["rank"])
        return Fitted(spec, {"left": left_EOR, "right": right_RN})
