"""What a form of method=factorize is: which factors, how large, and their values.

A class each, in a file of its own. A form gets the gate projections of all experts of a layer
together, then the up and the down projections, and gives factors of one of the kinds of
`models/factors.py`. Letters: E experts, O outputs, N inputs, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.chosen import ChosenBy
from moe_lab.models.factors import Spec, StackShape, factors_of
from moe_lab.option import Plugin, check_options
from moe_lab.types import UserError

NO_FORMS = (
    "base",
    "alternating",
    "low_rank",
    "whitening",
)  # the files of this package that are no forms
FORM_FILES = (str(__package__), *NO_FORMS)


@dataclass(frozen=True)
class ExpertMatrices:
    """One kind of matrix of all experts of a layer, in float64.

    name: gate, up or down; weight: [E, O, N]. Only where the form asks for it: covariance, the
    uncentred sums [E, N, N] of each expert's inputs over its tokens, and count [E] of these;
    mean [O, N], weighted by Fisher information. seed: of what is drawn for this layer and matrix.
    """

    name: str
    weight: Tensor
    covariance: Tensor | None = None
    count: Tensor | None = None
    mean: Tensor | None = None
    seed: int = 0

    @property
    def shape(self) -> StackShape:
        """E, O, N."""
        number, outputs, inputs = self.weight.shape
        return number, outputs, inputs


@dataclass(frozen=True)
class Fitted:
    """Factors that were found: what they are, and their values by name, in float64."""

    spec: Spec
    tensors: Mapping[str, Tensor]


class Factorization(Plugin, ABC):
    """A form of the matrices; its options are its fields.

    `spec` and `fit` have to be there. What else may be:
    budgets(shapes, total): how many parameters each matrix may have of the layer's; by default all
    lose the same share.
    needs_inputs, needs_fisher: whether `fit` looks at the inputs' covariances, or at the means by
    Fisher information; by default not.
    num_samples: on how many documents these are found; by default None, on all.
    gated, token_weight: whether the router's weights count in the covariances, and what tokens
    weigh there (`grams.TOKEN_WEIGHTS`); by default not, and all alike.
    check(shapes): refuses what is impossible before any work, with a UserError; by default values
    that are out of the range which their `Option` says.
    name: how reports call it; by default its file's name.
    """

    needs_fisher: bool = False
    num_samples: int | None = None
    gated: bool = False
    token_weight: str = "none"

    @property
    def name(self) -> str:
        """How reports call it."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def needs_inputs(self) -> bool:
        """Whether `fit` looks at the covariances of the inputs."""
        return False

    @property
    def needs_model(self) -> bool:
        """Whether it has text go through the model."""
        return self.needs_inputs or self.needs_fisher

    @abstractmethod
    def spec(self, matrix: str, shape: StackShape, budget: int) -> Spec:
        """The largest factors that `budget` parameters allow; ranks below 1 where none do."""

    @abstractmethod
    def fit(self, matrices: ExpertMatrices, spec: Spec, budget: int) -> Fitted:
        """The factors' values; a form may choose others of the same budget by the weights."""

    def budgets(self, shapes: Mapping[str, StackShape], total: int) -> dict[str, int]:
        """How many parameters each matrix may have."""
        whole = sum(number * outputs * inputs for number, outputs, inputs in shapes.values())
        return {
            name: total * number * outputs * inputs // whole
            for name, (number, outputs, inputs) in shapes.items()
        }

    def check(self, shapes: Mapping[str, StackShape]) -> None:
        """Refuse what is impossible before any work."""
        check_options(self, "form")


FORMS: ChosenBy[Factorization] = ChosenBy("form", str(__package__), Factorization, NO_FORMS)


def refuse_rank(matrix: str, shape: StackShape, budget: int, least: int) -> UserError:
    """The refusal of a budget that leaves no rank; least: what the smallest factors need."""
    whole = shape[0] * shape[1] * shape[2]
    return UserError(
        f"the {matrix} projections of a layer may have {max(0, budget):,} of {whole:,} parameters, "
        f"and factors of rank 1 need {least:,}: a smaller ratio.ratio leaves more"
    )


def stack_values(fitted: Fitted, shape: StackShape) -> Tensor:
    """The matrices [E, O, N] that the factors stand for, float64."""
    like = next(iter(fitted.tensors.values())).double()
    factors = factors_of(shape, fitted.spec, like)
    with torch.no_grad():
        for name, tensor in factors.state_dict(keep_vars=True).items():
            tensor.data.copy_(fitted.tensors[name])
        return factors.dense()


def relative_error(matrices: ExpertMatrices, fitted: Fitted) -> float:
    """The squared error as a share of the squared size: of the outputs, else of the weights.

    Of the outputs, sum over experts of tr(D C D^T), where the covariances C are there.
    """
    lost_EON = matrices.weight - stack_values(fitted, matrices.shape)
    whole = _size(matrices.weight, matrices.covariance)
    return _size(lost_EON, matrices.covariance) / whole if whole else 0.0


def _size(weight_EON: Tensor, covariance_ENN: Tensor | None) -> float:
    if covariance_ENN is None:
        return float(weight_EON.square().sum())
    return float((weight_EON @ covariance_ENN * weight_EON).sum())
