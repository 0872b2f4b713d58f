"""D2-MoE: a mean of all experts, and what each differs from it at a low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.factorizing.base import ExpertMatrices, Fitted, refuse_rank
from moe_lab.methods.factorizing.low_rank import each_by_itself, shared_left, shared_right
from moe_lab.methods.factorizing.whitening import Whitening
from moe_lab.models.factors import Spec, StackShape
from moe_lab.option import Option

WEIGHTINGS = ("fisher", "frequency", "none")
SHARED = {"none": None, "U": "left", "V": "right"}


@dataclass(frozen=True)
class D2MoE(Whitening):
    """D2-MoE (2502.17298): W_e = B + L_e R_e; B = sum_e F_e f_e W_e / sum_e F_e f_e element by
    element, F the diagonal Fisher information and f the experts' frequencies; L_e R_e the whitened
    truncated SVD of W_e - B.

    weighting: frequency and none leave F, or F and f, out. share: V, one right factor for all
    experts of the layer; U, one left factor; none. pp_ratio: the share of B's columns that go,
    those first whose output is smallest, ||column||^2 times the mean square of its input (the rule
    is ours: how the paper's code scores columns is not known to us). It is 0 here, so that factors
    of full rank are the layer itself, and .2 in the paper; differences are of the whole B there and
    here.
    """

    weighting: Annotated[str, Option("what weighs the experts in their mean", among=WEIGHTINGS)] = (
        "fisher"
    )
    share: Annotated[
        str, Option("which factor of the differences all experts share", among=tuple(SHARED))
    ] = "none"
    pp_ratio: Annotated[
        float, Option("share of the mean's columns that goes; the paper's is 0.2", least=0, below=1)
    ] = 0.0

    @property
    def needs_fisher(self) -> bool:  # type: ignore[override]  # as its option says
        """Where the Fisher information weighs."""
        return self.weighting == "fisher"

    @property
    def needs_inputs(self) -> bool:
        """Also for frequencies, and for the columns that go."""
        return self.whiten or self.weighting == "frequency" or self.pp_ratio > 0

    def spec(self, matrix: str, shape: StackShape, budget: int) -> Spec:
        """The base first, then the largest rank of the differences."""
        number, outputs, inputs = shape
        kept = inputs - int(inputs * self.pp_ratio)
        shared = SHARED[self.share]
        left = outputs * (1 if shared == "left" else number)
        right = inputs * (1 if shared == "right" else number)
        base, each = outputs * kept, left + right
        if budget < base + each:
            raise refuse_rank(matrix, shape, budget, base + each)
        most = min(outputs, inputs)
        if shared is not None:
            most = outputs if shared == "left" else inputs
        rank = min((budget - base) // each, most)
        return {"kind": "low_rank", "rank": rank, "shared": shared, "base": kept}

    def fit(self, matrices: ExpertMatrices, spec: Spec, budget: int) -> Fitted:
        """The base, what every expert differs from it, and then the base's columns."""
        base_ON = self._mean(matrices)
        tensors = self._differences(matrices, matrices.weight - base_ON, spec)
        kept, inputs = spec["base"], matrices.shape[2]
        if kept < inputs:
            columns = self._columns(matrices, base_ON, kept)
            tensors |= {"columns": columns, "base": base_ON[:, columns].contiguous()}
        else:
            tensors["base"] = base_ON
        return Fitted(spec, tensors)

    def _mean(self, matrices: ExpertMatrices) -> Tensor:
        if self.weighting == "fisher" and matrices.mean is not None:
            return matrices.mean
        share_E = torch.ones(matrices.shape[0], dtype=torch.float64)
        if self.weighting == "frequency" and matrices.count is not None:
            share_E = matrices.count if bool(matrices.count.any()) else share_E
        return torch.einsum("e,eon->on", share_E / share_E.sum(), matrices.weight)

    def _differences(
        self, matrices: ExpertMatrices, lost_EON: Tensor, spec: Spec
    ) -> dict[str, Tensor]:
        rank, shared = spec["rank"], spec["shared"]
        if shared == "left":
            covariances = self.covariances(matrices, together=True)
            left_OR, right_ERN = shared_left(lost_EON, covariances, rank)
            return {"left": left_OR, "right": right_ERN}
        if shared == "right":
            left_EOR, right_RN = shared_right(lost_EON, self.pooled(matrices), matrices.count, rank)
            return {"left": left_EOR, "right": right_RN}
        left_EOR, right_ERN = each_by_itself(lost_EON, self.covariances(matrices), rank)
        return {"left": left_EOR, "right": right_ERN}

    def _columns(self, matrices: ExpertMatrices, base_ON: Tensor, kept: int) -> Tensor:
        size_N = base_ON.square().sum(dim=0)
        if matrices.covariance is not None:
            size_N = size_N * matrices.covariance.sum(dim=0).diagonal()
        return size_N.argsort(descending=True, stable=True)[:kept].sort().values
