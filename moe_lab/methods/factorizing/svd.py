"""Each matrix of each expert by itself, cut to a low rank."""

from __future__ import annotations

from dataclasses import dataclass

from moe_lab.methods.factorizing.base import ExpertMatrices, Fitted, refuse_rank
from moe_lab.methods.factorizing.low_rank import each_by_itself
from moe_lab.methods.factorizing.whitening import Whitening
from moe_lab.models.factors import Spec, StackShape


@dataclass(frozen=True)
class SVD(Whitening):
    """W_e = L_e R_e, the truncated SVD of W_e S_e (SVD-LLM, 2403.07378): S_e the Cholesky factor of
    the covariance of the inputs that are routed to expert e. Without whiten, of W_e.

    The rank is int(O N ratio / (O + N)), ratio the share that stays, as in SVD-LLM and D2-MoE. An
    expert without tokens has the plain SVD.
    """

    def spec(self, matrix: str, shape: StackShape, budget: int) -> Spec:
        """The largest rank of all experts alike."""
        number, outputs, inputs = shape
        each = number * (outputs + inputs)
        if budget < each:
            raise refuse_rank(matrix, shape, budget, each)
        return {"kind": "low_rank", "rank": min(budget // each, outputs, inputs)}

    def fit(self, matrices: ExpertMatrices, spec: Spec, budget: int) -> Fitted:
        """Each expert's by itself: L_e = U_R, R_e = U_R^T W_e."""
        left_EOR, right_ERN = each_by_itself(
            matrices.weight, self.covariances(matrices), spec["rank"]
        )
        return Fitted(spec, {"left": left_EOR, "right": right_ERN})
