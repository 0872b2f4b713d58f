"""The experts' matrices as one tensor in tensor-ring form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moe_lab.methods.factorizing.alternating import solved_factor
from moe_lab.methods.factorizing.base import ExpertMatrices, Factorization, Fitted, refuse_rank
from moe_lab.models.factors import Spec, StackShape, num_factor_parameters
from moe_lab.option import Option

Cores = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TR(Factorization):
    """W_eon = sum_abc G_aeb H_bnc K_coa, the form of TR-muMoE layers (2402.12550): the cores of a
    tensor ring, found by truncated SVDs (TR-SVD) and rounds of least squares.

    A baseline of ours in the paper's form, not its method: muMoE trains such layers from scratch,
    with a dense mix of all experts. Of all ranks (a, b, c) that the parameters allow, a and b
    powers of two with a b up to E, and c as large as fits, those whose TR-SVD has the least error
    are taken. a = 1, b = E is a basis on the side of the outputs that all experts share; a = E,
    b = 1 one on the side of the inputs.
    """

    sweeps: Annotated[int, Option("rounds of least squares over the three cores", least=0)] = 5

    def spec(self, matrix: str, shape: StackShape, budget: int) -> Spec:
        """The ranks that use most of the parameters: what is known before the weights are."""
        possible = [{"kind": "ring", "ranks": list(one)} for one in ranks(shape, budget)]
        if not possible:
            raise refuse_rank(matrix, shape, budget, sum(shape))
        return max(possible, key=lambda spec: num_factor_parameters(shape, spec))

    def fit(self, matrices: ExpertMatrices, spec: Spec, budget: int) -> Fitted:
        """The best ranks by TR-SVD, then the rounds."""
        tensor = matrices.weight
        _, chosen, cores = min(
            ((_error(tensor, found), one, found)
             for one in ranks(matrices.shape, budget) for found in [ring_svd(tensor, one)]),
            key=lambda tried: tried[0],
        )  # fmt: skip
        for _ in range(self.sweeps):
            cores = swept(tensor, cores)
        names = ("experts", "inputs", "outputs")
        return Fitted({"kind": "ring", "ranks": list(chosen)}, dict(zip(names, cores, strict=True)))


def ranks(shape: StackShape, budget: int) -> Iterator[tuple[int, int, int]]:
    """All (a, b, c) that are tried, the smallest a and b first."""
    number, outputs, inputs = shape
    sizes = sorted({number, *(2**power for power in range(number.bit_length()))})
    for first in sizes:
        for second in (size for size in sizes if size * first <= number):
            left = budget - first * number * second
            third = left // (second * inputs + first * outputs)
            third = min(third, second * inputs, first * outputs)
            spec = {"kind": "ring", "ranks": (first, second, third)}
            if third >= 1 and num_factor_parameters(shape, spec) <= budget:
                yield first, second, third


def ring_svd(tensor_EON: Tensor, ranks: tuple[int, int, int]) -> Cores:
    """TR-SVD: experts are split off first, with a b singular components, then inputs with c."""
    number, outputs, inputs = tensor_EON.shape
    first, second, third = ranks
    u, s, vt = torch.linalg.svd(tensor_EON.reshape(number, -1), full_matrices=False)
    both = first * second
    experts = u[:, :both].unflatten(1, (first, second)).transpose(0, 1)
    rest = (
        (s[:both, None] * vt[:both]).unflatten(0, (first, second)).unflatten(2, (outputs, inputs))
    )
    matrix = rest.permute(1, 3, 2, 0).reshape(second * inputs, outputs * first)  # b n, o a
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = (u[:, :third] * s[:third].sqrt()).unflatten(0, (second, inputs))
    outer = (s[:third, None].sqrt() * vt[:third]).unflatten(1, (outputs, first))
    return experts.contiguous(), inner.contiguous(), outer.contiguous()


def whole(cores: Cores) -> Tensor:
    """The tensor [E, O, N]."""
    experts, inner, outer = cores
    return torch.einsum("aeb,bnc,coa->eon", experts, inner, outer)


def _error(tensor_EON: Tensor, cores: Cores) -> float:
    return float((tensor_EON - whole(cores)).square().sum())


def swept(tensor: Tensor, cores: Cores) -> Cores:
    """One round: each core by least squares, the others as they are."""
    experts, inner, outer = cores
    of_inner = torch.einsum("bnc,dnf->bcdf", inner, inner)
    of_outer = torch.einsum("coa,fog->cafg", outer, outer)
    gram = torch.einsum("bcdf,cafg->abgd", of_inner, of_outer)  # (a b), (g d)
    right = torch.einsum("eon,bnc,coa->eab", tensor, inner, outer)
    experts = _updated(gram, right, experts.transpose(0, 1)).transpose(0, 1)
    of_experts = torch.einsum("aeb,ged->abgd", experts, experts)
    gram = torch.einsum("abgd,cafg->bcdf", of_experts, of_outer)
    right = torch.einsum("eon,aeb,coa->nbc", tensor, experts, outer)
    inner = _updated(gram, right, inner.transpose(0, 1)).transpose(0, 1)
    of_inner = torch.einsum("bnc,dnf->bcdf", inner, inner)
    gram = torch.einsum("abgd,bcdf->cafg", of_experts, of_inner)
    right = torch.einsum("eon,aeb,bnc->oca", tensor, experts, inner)
    outer = _updated(gram, right, outer.transpose(0, 1)).transpose(0, 1)
    return experts, inner, outer


def _updated(gram: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """gram: [x, y, x, y]; right, old: [n, x, y]."""
    size = old.shape[1] * old.shape[2]
    new = solved_factor(gram.reshape(size, size), right.flatten(1), old.flatten(1))
    return new.reshape(old.shape)
