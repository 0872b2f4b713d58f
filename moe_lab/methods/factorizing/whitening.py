"""What forms share that look at the inputs of the calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.factorizing.base import ExpertMatrices, Factorization
from moe_lab.methods.factorizing.low_rank import damped
from moe_lab.option import Option
from moe_lab.profile.grams import TOKEN_WEIGHTS


@dataclass(frozen=True)
class Whitening(Factorization):
    """Least error of the outputs over the calibration text (SVD-LLM, 2403.07378).

    The inputs of an expert are those that the router sends it, in the intact model.
    """

    whiten: Annotated[
        bool, Option("least error of the outputs on the calibration text, not of the weights")
    ] = True
    damping: Annotated[
        float, Option("added to each covariance, as a share of its mean diagonal", above=0)
    ] = 1e-6
    gated: Annotated[
        bool, Option("tokens count by the square of the router's weight, not all alike")
    ] = False
    token_weight: Annotated[
        str,
        Option(
            "output: a token counts by 1 / the mean square of the state that leaves the layer; "
            "none: all alike, as in the papers",
            among=TOKEN_WEIGHTS,
        ),
    ] = "none"
    num_samples: Annotated[
        int | None, Option("documents for the covariances, null for all", least=1)
    ] = None

    @property
    def needs_inputs(self) -> bool:
        """Where it whitens."""
        return self.whiten

    def covariances(self, matrices: ExpertMatrices, together: bool = False) -> Tensor | None:
        """The damped covariances [E, N, N]; None where the weights alone count.

        together: for a sum over experts, in which each weighs as many tokens as it got; damping is
        then the same for all of them.
        """
        pooled_NN, covariance_ENN = self.pooled(matrices), matrices.covariance
        if pooled_NN is None or covariance_ENN is None:
            return None
        if not together:
            return torch.stack([damped(one, self.damping) for one in covariance_ENN])
        return covariance_ENN + (pooled_NN - covariance_ENN.sum(dim=0)) / len(covariance_ENN)

    def pooled(self, matrices: ExpertMatrices) -> Tensor | None:
        """The damped covariance [N, N] of what all experts get; None where weights alone count."""
        if not self.whiten or matrices.covariance is None:
            return None
        return damped(matrices.covariance.sum(dim=0), self.damping)
