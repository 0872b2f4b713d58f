"""The matrices of one kind of all experts of a layer, computed from factors.

Every kind of factors is inner(x), what all experts share on the side of the input; core(e, z), what
expert e does with it; outer(s), what all share on the side of the output: W_e x = outer(core(e,
inner(x))). Inner and outer are linear, so that a layer computes inner once for all experts of a
token, and outer once for their weighted sum. Letters: E experts, O outputs, N inputs, R rank, M
bases, S size of what core gives.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.types import UserError

Spec = Mapping[str, Any]  # of plain values, as JSON has them: the kind, ranks, what is shared
StackShape = tuple[int, int, int]  # E, O, N
FACTOR_KINDS: dict[str, type[Factors]] = {}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class Factors(nn.Module):
    """E matrices [O, N] in factors; spec: what they are, as config.json of our own form says it.

    kind: what "kind" in a spec says. of_experts: by the factors' names, in which dimension each
    has a place for every expert; the others are shared by all.
    """

    kind: ClassVar[str]
    of_experts: ClassVar[Mapping[str, int]] = {}

    def __init_subclass__(cls) -> None:
        FACTOR_KINDS[cls.kind] = cls

    def __init__(self, shape: StackShape, spec: Spec, like: Tensor):
        super().__init__()
        self.shape, self.spec = shape, dict(spec)
        for name, size in self.sizes(shape, spec).items():
            self.register_parameter(name, nn.Parameter(like.new_empty(size), requires_grad=False))

    @classmethod
    @abstractmethod
    def sizes(cls, shape: StackShape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors, by name."""

    @property
    def core_size(self) -> int:
        """S."""
        return self.shape[1]

    def inner(self, x_TN: Tensor) -> Tensor:
        """What all experts share of their input."""
        return x_TN

    @abstractmethod
    def core(self, expert: int, z: Tensor) -> Tensor:
        """What one expert does with it [T, S]."""

    def outer(self, s_TS: Tensor) -> Tensor:
        """What all share of their output [T, O]."""
        return s_TS

    def product(self, expert: int, x_TN: Tensor) -> Tensor:
        """W_e x, [T, O]."""
        return self.outer(self.core(expert, self.inner(x_TN)))

    def dense(self) -> Tensor:
        """The matrices themselves [E, O, N]."""
        like = next(self.parameters())
        one_NN = torch.eye(self.shape[2], dtype=like.dtype, device=like.device)
        return torch.stack([self.product(expert, one_NN).T for expert in range(self.shape[0])])

    def active_parameters(self, top_k: int) -> int:
        """How many of its parameters a token with so many experts uses."""
        return sum(
            parameter.numel() * top_k // self.shape[0]
            if name in self.of_experts
            else parameter.numel()
            for name, parameter in self.named_parameters()
        )


def factors_of(shape: StackShape, spec: Spec, like: Tensor) -> Factors:
    """The factors that a spec says, their values still to come; UserError for an unknown kind."""
    return _kind_of(spec)(shape, spec, like)


def num_factor_parameters(shape: StackShape, spec: Spec) -> int:
    """How many parameters such factors have together."""
    return sum(math.prod(size) for size in factor_sizes(shape, spec).values())


def factor_sizes(shape: StackShape, spec: Spec) -> dict[str, tuple[int, ...]]:
    """The shapes of such factors, by name."""
    return _kind_of(spec).sizes(shape, spec)


def _kind_of(spec: Spec) -> type[Factors]:
    kind = FACTOR_KINDS.get(spec["kind"])
    if kind is None:
        raise UserError(
            f"matrices of experts in factors of the kind {spec['kind']!r} are not known; known are "
            f"{', '.join(sorted(FACTOR_KINDS))}"
        )
    return kind


class Whole(Factors):
    """The matrices as they are: `weight` [E, O, N]."""

    weight: Tensor

    kind = "whole"
    of_experts: ClassVar[Mapping[str, int]] = {"weight": 0}

    @classmethod
    def sizes(cls, shape: StackShape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """All of them."""
        return {"weight": shape}

    def core(self, expert: int, z: Tensor) -> Tensor:
        """W_e x."""
        return F.linear(z, self.weight[expert])


class LowRank(Factors):
    """W_e = B + L_e R_e, B where `base` is not null.

    `left` [E, O, R] and `right` [E, R, N]; what `shared` names ("left", "right") is one for all
    experts, and has no E. `base` is how many columns B has [O, base]; where these are not all N,
    the buffer `columns` [base] says which, and the others are zero.
    """

    left: Tensor
    right: Tensor
    base: Tensor
    columns: Tensor

    kind = "low_rank"

    def __init__(self, shape: StackShape, spec: Spec, like: Tensor):
        super().__init__(shape, spec, like)
        kept = spec.get("base")
        self.has_base = kept is not None
        self.has_columns = kept is not None and kept < shape[2]
        if self.has_columns:
            columns = torch.zeros(kept or 0, dtype=torch.int64, device=like.device)
            self.register_buffer("columns", columns)

    @classmethod
    def sizes(cls, shape: StackShape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """Left, right, and the base."""
        number, outputs, inputs = shape
        rank, shared = spec["rank"], spec.get("shared")
        sizes: dict[str, tuple[int, ...]] = {"left": (outputs, rank), "right": (rank, inputs)}
        sizes = {name: size if name == shared else (number, *size) for name, size in sizes.items()}
        return sizes | ({"base": (outputs, spec["base"])} if spec.get("base") is not None else {})

    @property
    def of_experts(self) -> Mapping[str, int]:  # type: ignore[override]  # by what is shared
        """Left and right but for what is shared."""
        return {name: 0 for name in ("left", "right") if name != self.spec.get("shared")}

    @property
    def core_size(self) -> int:
        """R where the left factor is everybody's, and O behind it for the base."""
        if self.spec.get("shared") != "left":
            return self.shape[1]
        return int(self.spec["rank"]) + (self.shape[1] if self.has_base else 0)

    def inner(self, x_TN: Tensor) -> Tensor:
        """R x where the right factor is everybody's; behind it B x."""
        z = F.linear(x_TN, self.right) if self.spec.get("shared") == "right" else x_TN
        return torch.cat([z, self._of_base(x_TN)], dim=-1) if self.has_base else z

    def core(self, expert: int, z: Tensor) -> Tensor:
        """L_e R_e x + B x, without what is shared; where that is L, R_e x and B x side by side."""
        shared = self.spec.get("shared")
        inputs = int(self.spec["rank"]) if shared == "right" else self.shape[2]
        z, of_base = z[..., :inputs], z[..., inputs:]
        y = z if shared == "right" else F.linear(z, self.right[expert])
        if shared == "left":
            return torch.cat([y, of_base], dim=-1) if self.has_base else y
        y = F.linear(y, self.left[expert])
        return y + of_base if self.has_base else y

    def outer(self, s_TS: Tensor) -> Tensor:
        """L s where the left factor is everybody's, and what the base gave."""
        if self.spec.get("shared") != "left":
            return s_TS
        rank = int(self.spec["rank"])
        y_TO = F.linear(s_TS[..., :rank], self.left)
        return y_TO + s_TS[..., rank:] if self.has_base else y_TO

    def _of_base(self, x_TN: Tensor) -> Tensor:
        return F.linear(x_TN[..., self.columns] if self.has_columns else x_TN, self.base)


class MixedBases(Factors):
    """W_e = A_e phi(sum_j c_ej B_j) (MoBE 2508.05257): `left` A [E, O, R], `bases` B [M, R, N].

    `mixture` c [E, M] is what softmax has made of the paper's logits.
    """

    left: Tensor
    bases: Tensor
    mixture: Tensor

    kind = "mixed_bases"
    of_experts: ClassVar[Mapping[str, int]] = {"left": 0, "mixture": 0}

    @classmethod
    def sizes(cls, shape: StackShape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """All three."""
        number, outputs, inputs = shape
        rank, bases = spec["rank"], spec["bases"]
        return {
            "left": (number, outputs, rank),
            "bases": (bases, rank, inputs),
            "mixture": (number, bases),
        }

    def core(self, expert: int, z: Tensor) -> Tensor:
        """The expert's own basis first, then A."""
        mixed_RN = torch.einsum("m,mrn->rn", self.mixture[expert], self.bases)
        basis_RN = ACTIVATIONS[self.spec["activation"]](mixed_RN)
        return F.linear(F.linear(z, basis_RN), self.left[expert])


class Canonical(Factors):
    """W_eon = sum_r a_er o_or i_rn (CP): `experts` [E, R], `left` [O, R], `right` [R, N]."""

    experts: Tensor
    left: Tensor
    right: Tensor

    kind = "canonical"
    of_experts: ClassVar[Mapping[str, int]] = {"experts": 0}

    @classmethod
    def sizes(cls, shape: StackShape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """All three."""
        number, outputs, inputs = shape
        rank = spec["rank"]
        return {"experts": (number, rank), "left": (outputs, rank), "right": (rank, inputs)}

    @property
    def core_size(self) -> int:
        """R."""
        return int(self.spec["rank"])

    def inner(self, x_TN: Tensor) -> Tensor:
        """By the right factor."""
        return F.linear(x_TN, self.right)

    def core(self, expert: int, z: Tensor) -> Tensor:
        """Each component times the expert's own factor."""
        return z * self.experts[expert]

    def outer(self, s_TS: Tensor) -> Tensor:
        """By the left factor."""
        return F.linear(s_TS, self.left)


class Ring(Factors):
    """W_eon = sum_abc G_aeb H_bnc K_coa (a tensor ring); ranks: of a, b and c.

    `experts` G [A, E, B], `inputs` H [B, N, C], `outputs` K [C, O, A].
    """

    experts: Tensor
    inputs: Tensor
    outputs: Tensor

    kind = "ring"
    of_experts: ClassVar[Mapping[str, int]] = {"experts": 1}

    @classmethod
    def sizes(cls, shape: StackShape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The three cores."""
        number, outputs, inputs = shape
        first, second, third = spec["ranks"]
        return {
            "experts": (first, number, second),
            "inputs": (second, inputs, third),
            "outputs": (third, outputs, first),
        }

    @property
    def core_size(self) -> int:
        """A C."""
        return int(self.spec["ranks"][0] * self.spec["ranks"][2])

    def inner(self, x_TN: Tensor) -> Tensor:
        """[T, B C]."""
        return F.linear(x_TN, self.inputs.transpose(1, 2).flatten(0, 1))

    def core(self, expert: int, z: Tensor) -> Tensor:
        """The expert's slice [A, B] on the index b: [T, A C]."""
        z_TBC = z.unflatten(-1, self.spec["ranks"][1:])
        return torch.matmul(self.experts[:, expert], z_TBC).flatten(-2)

    def outer(self, s_TS: Tensor) -> Tensor:
        """By the last core."""
        return F.linear(s_TS, self.outputs.permute(1, 2, 0).flatten(1))
