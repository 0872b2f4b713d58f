"""The experts' matrices as one tensor in CP form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.factorizing.alternating import solved_factor
from moe_lab.methods.factorizing.base import ExpertMatrices, Factorization, Fitted, refuse_rank
from moe_lab.models.factors import Spec, StackShape
from moe_lab.option import Option
from moe_lab.types import UserError

STARTS = ("svd", "random")
MOST_COMPONENTS = 8192  # whose normal equations take half a gigabyte


@dataclass(frozen=True)
class CP(Factorization):
    """W_eon = sum_r a_er o_or i_nr, the form of CP-muMoE layers (2402.12550), found by alternating
    least squares from experts that were trained as matrices.

    A baseline of ours in the paper's form, not its method: muMoE trains such layers from scratch,
    with a dense mix of all experts. start=svd: the experts' largest singular components, each of
    one expert: no worse than a truncated SVD whose ranks differ by expert, and nothing is drawn;
    random: normal values.
    """

    sweeps: Annotated[int, Option("rounds of least squares over the three factors", least=0)] = 10
    start: Annotated[str, Option("where the rounds begin", among=STARTS)] = "svd"
    seed: Annotated[int, Option("of start=random")] = 0

    def spec(self, matrix: str, shape: StackShape, budget: int) -> Spec:
        """The most components: R (E + O + N) parameters."""
        each = sum(shape)
        if budget < each:
            raise refuse_rank(matrix, shape, budget, each)
        number, outputs, inputs = shape
        rank = min(budget // each, number * min(outputs, inputs))
        if rank > MOST_COMPONENTS:
            raise UserError(
                f"form=cp: the {matrix} projections would have {rank:,} components, whose normal "
                f"equations are as large squared; {MOST_COMPONENTS:,} are possible: form=tr or "
                "form=svd for models of this size"
            )
        return {"kind": "canonical", "rank": rank}

    def fit(self, matrices: ExpertMatrices, spec: Spec, budget: int) -> Fitted:
        """The start, then the rounds."""
        tensor = matrices.weight
        if self.start == "svd":
            experts, left, right = largest_components(tensor, spec["rank"])
        else:
            experts, left, right = self._drawn(matrices, spec["rank"])
        for _ in range(self.sweeps):
            experts = solved_factor(
                (left.T @ left) * (right.T @ right),
                torch.einsum("eon,or,nr->er", tensor, left, right), experts,
            )  # fmt: skip
            left = solved_factor(
                (experts.T @ experts) * (right.T @ right),
                torch.einsum("eon,er,nr->or", tensor, experts, right), left,
            )  # fmt: skip
            right = solved_factor(
                (experts.T @ experts) * (left.T @ left),
                torch.einsum("eon,er,or->nr", tensor, experts, left), right,
            )  # fmt: skip
        tensors = dict(
            zip(("experts", "left", "right"), _balanced(experts, left, right), strict=True)
        )
        return Fitted(spec, tensors | {"right": tensors["right"].T.contiguous()})

    def _drawn(self, matrices: ExpertMatrices, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + matrices.seed)
        first, second, third = (
            torch.randn(size, rank, generator=generator, dtype=torch.float64)
            for size in matrices.shape
        )
        return first, second, third


def largest_components(tensor_EON: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular components of all experts' matrices: [E, R], [O, R], [N, R]."""
    u, s, vt = torch.linalg.svd(tensor_EON, full_matrices=False)
    chosen_R = s.flatten().argsort(descending=True, stable=True)[:rank]
    expert_R, place_R = chosen_R // s.shape[1], chosen_R % s.shape[1]
    experts_ER = torch.nn.functional.one_hot(expert_R, len(s)).T.to(s) * s.flatten()[chosen_R]
    return experts_ER, u[expert_R, :, place_R].T, vt[expert_R, place_R].T


def _balanced(*factors: Tensor) -> list[Tensor]:
    """The same components with each one's size shared out evenly among its factors."""
    norms = [one.norm(dim=0) for one in factors]
    size_R = (norms[0] * norms[1] * norms[2]).pow(1 / 3)
    return [
        torch.where(norm > 0, one / norm.clamp(min=1e-300) * size_R, 0.0)
        for one, norm in zip(factors, norms, strict=True)
    ]
