"""MoBE: gate and up projections mix a few bases, which all experts of a layer share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.factorizing.base import ExpertMatrices, Factorization, Fitted, refuse_rank
from moe_lab.models.factors import ACTIVATIONS, Spec, StackShape
from moe_lab.option import Option
from moe_lab.types import UserError

LOOKED_AT = (
    200  # steps between two looks whether the fit is the best so far, as in the paper's code
)


@dataclass(frozen=True)
class MoBE(Factorization):
    """MoBE (2508.05257): W_e = sigma A_e phi(sum_j softmax(omega_e)_j B_j) for gate and up, A_e
    [O, R] and B_j [R, N]; down projections stay. sigma, the standard deviation of all entries of
    the layer's matrices of the kind, is folded into A at the end.

    It begins with a truncated SVD of each group of experts, consecutive ones, under one another: A
    = U S, B = V^T, and omega is `logit` where an expert's own group is, else 0. Adam then lowers
    the mean squared error of W / sigma, full batch, in float32; the best of each 200 steps stays.
    Data-free, and nothing is drawn.

    bases: null, a quarter of the experts, as most of the paper's models (32 of 128, 64 of 256).
    rank: null, as large as the parameters allow and at most O, the paper's; bases are then added
    while parameters are left. The paper has R = O, 10,000 to 30,000 steps, and logit 1: then the
    start mixes all bases, and is not the SVD.
    """

    bases: Annotated[int | None, Option("bases, null for a quarter of the experts", least=1)] = None
    rank: Annotated[
        int | None, Option("rows of a basis, null for as many as fit, at most a matrix's", least=1)
    ] = None
    activation: Annotated[str, Option("phi, behind the mixed bases", among=tuple(ACTIVATIONS))] = (
        "silu"
    )
    steps: Annotated[int, Option("steps of Adam; the paper has 10000 to 30000", least=0)] = 500
    learning_rate: Annotated[float, Option("of Adam", above=0)] = 0.07
    logit: Annotated[
        float, Option("of an expert's own basis at the start; the paper's code has 1", least=0)
    ] = 10.0

    def budgets(self, shapes: Mapping[str, StackShape], total: int) -> dict[str, int]:
        """Down projections whole, the others half of what is left each."""
        number, outputs, inputs = shapes["down"]
        down = number * outputs * inputs
        return {"gate": (total - down) // 2, "up": (total - down) // 2, "down": down}

    def spec(self, matrix: str, shape: StackShape, budget: int) -> Spec:
        """As many rows of a basis as fit, then as many bases; E O R + M R N + E M parameters."""
        if matrix == "down":
            return {"kind": "whole"}
        number, outputs, inputs = shape
        bases = max(1, number // 4) if self.bases is None else self.bases
        if bases > number:
            raise UserError(
                f"form.bases={bases}: a layer has {number} experts, and at most as many"
            )
        least = number * outputs + bases * inputs + number * bases
        if budget < least:
            raise refuse_rank(matrix, shape, budget, least)
        rank = min((budget - number * bases) // (number * outputs + bases * inputs), outputs)
        if self.rank is not None:
            if self.rank > rank:
                raise UserError(
                    f"form.rank={self.rank}: with {bases} bases there is room for {rank} rows at "
                    f"most: ask for fewer bases (form.bases), or less (form.rank)"
                )
            rank = self.rank
        if self.bases is None:
            left = (budget - number * outputs * rank) // (rank * inputs + number)
            bases = max(bases, min(left, number))
        return {
            "kind": "mixed_bases", "rank": rank, "bases": bases, "activation": self.activation,
        }  # fmt: skip

    def fit(self, matrices: ExpertMatrices, spec: Spec, budget: int) -> Fitted:
        """The start, then Adam."""
        if matrices.name == "down":
            return Fitted(spec, {"weight": matrices.weight})
        sigma = float(matrices.weight.std()) or 1.0
        start = self.start(matrices.weight / sigma, spec)
        with torch.enable_grad():
            found = self._fitted((matrices.weight / sigma).float(), start)
        left, bases, omega = (one.double() for one in found)
        mixture = omega.softmax(dim=1)
        return Fitted(spec, {"left": sigma * left, "bases": bases, "mixture": mixture})

    def start(self, weight_EON: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
        """A [E, O, R], B [M, R, N] and omega [E, M] from the truncated SVD of each group."""
        number, outputs, inputs = weight_EON.shape
        rank, bases = spec["rank"], spec["bases"]
        left_EOR = weight_EON.new_zeros(number, outputs, rank)
        base_MRN = weight_EON.new_zeros(bases, rank, inputs)
        omega_EM = weight_EON.new_zeros(number, bases)
        for group, experts in enumerate(torch.arange(number).tensor_split(bases)):
            u, s, vt = torch.linalg.svd(weight_EON[experts].flatten(0, 1), full_matrices=False)
            most = min(rank, len(s))
            us = (u[:, :most] * s[:most]).unflatten(0, (len(experts), outputs))
            left_EOR[experts, :, :most] = us
            base_MRN[group, :most] = vt[:most]
            omega_EM[experts, group] = self.logit
        return left_EOR, base_MRN, omega_EM

    def _fitted(
        self, wanted_EON: Tensor, start: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        """The best by its error among the start and each 200 steps, and the last."""
        parts = [one.float().clone().requires_grad_() for one in start]
        adam = torch.optim.Adam(parts, lr=self.learning_rate)
        best, kept = float("inf"), tuple(one.detach().clone() for one in parts)
        for step in range(self.steps + 1):
            loss = self.loss(wanted_EON, *parts)
            looked_at = step % LOOKED_AT == 0 or step == self.steps
            if looked_at and loss.item() < best:
                best, kept = loss.item(), tuple(one.detach().clone() for one in parts)
            if step < self.steps:
                adam.zero_grad()
                loss.backward()
                adam.step()
        return kept

    def loss(self, wanted_EON: Tensor, left: Tensor, bases: Tensor, omega: Tensor) -> Tensor:
        """The mean squared error."""
        mixed_ERN = torch.einsum("em,mrn->ern", omega.softmax(dim=1), bases)
        return (left @ ACTIVATIONS[self.activation](mixed_ERN) - wanted_EON).square().mean()
