"""One layer condensed in closed form: which hidden units, and the down projection that suits them.

A dense layer is linear in its down projection: given what its hidden units z compute for each
token, the columns W that bring it closest to what the layer should add, y, solve

    sum over tokens of w_t ||W z_t - y_t||^2 + sum over units of lambda_n ||W_n - P_n||^2,

P the columns that the constant gates give (CD-MoE, 2412.00069): a strong ridge returns the paper's
layer. How strong it is, the held-out documents say (`least_squares.fitted`). What y is, and w_t,
says `layer_data.Walk`. Ours; the paper refits nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from moe_lab.methods.condense.base import (
    UnitCandidates,
    choice_named,
    chooses_units,
    shared_gate,
)
from moe_lab.methods.condense.expert_choice import Asked, ExpertChoices
from moe_lab.methods.condense.layer_data import LayerData
from moe_lab.methods.condense.layer_fit import DenseWeights, fit_layer
from moe_lab.methods.least_squares import Fit, NormalEquations, TokenRows, fitted, solved
from moe_lab.methods.ridge import RIDGES, SCALES, Ridge
from moe_lab.models.condensing import part_widths
from moe_lab.models.dense_units import (
    SHARED_PART,
    UnitWeights,
    all_units,
)
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import MoELayer
from moe_lab.models.predictions import exact
from moe_lab.profile.profile import Tensors
from moe_lab.types import LayerInfo

logger = logging.getLogger(__name__)
CANDIDATES = 4096  # hidden units among which some are chosen, where there are more
SCREENED_BY = 4096  # tokens


class AskedRefit(Asked, Protocol):
    """What a refit needs to know of the method's options (`method.Condense`)."""

    refit: str
    token_weight: str
    ridge: float | None
    own_documents: int
    own_weight: float
    width: int | None
    fit_steps: int

    @property
    def propagated(self) -> str:
        """none, block or residual."""
        ...


class Solver:
    """Solves one layer after another, by the method's options."""

    def __init__(self, method: AskedRefit, choices: ExpertChoices):
        self.method, self.choices = method, choices

    def solve(self, layer: MoELayer, data: LayerData, steps: int = 0) -> Tensors:
        """What becomes of a layer whose weights are in memory."""
        if self.method.refit == "gates":
            return self._gates(layer, data)
        weights = UnitWeights(layer)
        units_N2 = self._units(weights, data)
        prior_ND = self._columns(weights, units_N2)
        hidden = weights.hidden(units_N2)
        fit = self._fit(functools.partial(_rows, data, hidden), prior_ND)
        found = {
            "units": units_N2.to("cpu", torch.int32),
            "down_proj": fit.columns_ND.T.float().cpu(),
        } | _told(fit)
        if steps:
            found |= self._stepped(weights, units_N2, prior_ND, data, fit, steps)
        return found

    def _fit(self, rows: Callable[[bool], Iterator[TokenRows]], prior_ND: Tensor) -> Fit:
        """The columns for these rows, given of the held-out documents (True), or of the others."""
        equations = NormalEquations(len(prior_ND), prior_ND.shape[1], prior_ND.device)
        for one in rows(False):
            equations.add(one)
        ridges = RIDGES if self.method.ridge is None else [Ridge(self.method.ridge, "mean")]
        return fitted(equations, lambda: rows(True), prior_ND, ridges)

    def _stepped(
        self,
        weights: UnitWeights,
        units_N2: Tensor,
        prior_ND: Tensor,
        data: LayerData,
        fit: Fit,
        steps: int,
    ) -> Tensors:
        """What gradient steps on all three projections make of the closed form."""
        rows = weights.rows(units_N2)
        unseen_ND = solved(_equations(weights, units_N2, data, held=False), prior_ND, fit.ridge)
        made = fit_layer(
            DenseWeights(*rows, fit.columns_ND), weights.layer.experts.act_fn, data.chunks, steps,
            self.method.seed, DenseWeights(*rows, unseen_ND),
        )  # fmt: skip
        logger.info(
            "layer %d: %d steps, relative error on held-out documents %.4g, before %.4g",
            weights.layer.info.index, made.steps, made.held_error, made.start_error,
        )  # fmt: skip
        if not made.steps:
            return {}
        gate_WD, up_WD, columns_WD = (one.cpu() for one in made.weights)
        errors = [fit.prior_error, fit.held_error, fit.error, made.held_error]
        return {
            "gate_proj": gate_WD,
            "up_proj": up_WD,
            "down_proj": columns_WD.T,
            "steps": torch.tensor(made.steps),
            "errors": torch.tensor(errors, dtype=torch.float64),
        }

    def _units(self, weights: UnitWeights, data: LayerData) -> Tensor:
        """The hidden units that stay [W, 2]; where they are chosen, on all documents."""
        info = weights.layer.info
        if not chooses_units(self.method.experts):
            return all_units(info, self.choices.edits([info.index])[info.index].experts)
        width = self.method.width or condensed_width(info, self.method.num_routed)
        pool_N2 = all_units(info)
        if len(pool_N2) > max(CANDIDATES, 2 * width):
            pool_N2 = _screened(weights, pool_N2, data, max(CANDIDATES, 2 * width))
        equations = _equations(weights, pool_N2, data, held=None)
        candidates = UnitCandidates(
            pool_N2, equations, self._columns(weights, pool_N2), width, self.method.num_routed
        )
        choose = choice_named("experts", str(self.method.experts))
        places: Tensor = choose(candidates)
        return pool_N2[places.cpu()]

    def _columns(self, weights: UnitWeights, units_N2: Tensor) -> Tensor:
        """The columns [N, D] that constant gates give hidden units."""
        statistics = self.choices.statistics[weights.layer.info.index]
        gates_E: Tensor = choice_named("gates", self.method.gates)(statistics).double()
        expert_N = units_N2[:, 0]
        gate_N = gates_E[expert_N.clamp(min=0)]
        gate_N[expert_N == SHARED_PART] = shared_gate(statistics)
        columns_ND = weights.columns(units_N2)
        return columns_ND * gate_N.to(columns_ND)[:, None]

    def _gates(self, layer: MoELayer, data: LayerData) -> Tensors:
        """The constant gates by least squares: one number for each part of the layer."""
        index, factors = layer.info.index, UnitWeights(layer).factors
        edit = self.choices.edits([index])[index]
        parameters = expert_parameters(layer.experts)

        def rows(held: bool) -> Iterator[TokenRows]:
            for chunk in data.chunks(held):
                parts = [] if layer.shared is None else [layer.shared(chunk.x_TD) * factors.shared]
                for expert in edit.experts:
                    output = expert_forward(layer.experts, parameters[expert], chunk.x_TD)
                    parts.append(output * factors.routed)
                z_NP = exact(torch.stack(parts, dim=-1).flatten(0, 1))
                weight_N = chunk.weight_T.repeat_interleave(chunk.target_TD.shape[1])
                yield TokenRows(z_NP, chunk.target_TD.flatten()[:, None], weight_N)

        shared = [] if layer.shared is None else [edit.shared_gate]
        prior_P1 = torch.tensor([*shared, *edit.gates], dtype=torch.float64)[:, None]
        fit = self._fit(rows, prior_P1.to(layer.experts.down_proj.device))
        return {"gates": fit.columns_ND[:, 0].double().cpu()} | _told(fit)


def condensed_width(info: LayerInfo, num_routed: int) -> int:
    """How wide the layer is with its shared experts and so many routed ones."""
    return sum(part_widths(info, range(num_routed)))


def _rows(
    data: LayerData, hidden: Callable[[Tensor], Tensor], held: bool | None
) -> Iterator[TokenRows]:
    for chunk in data.chunks(held):
        yield TokenRows(exact(hidden(chunk.x_TD)), chunk.target_TD, chunk.weight_T)


def _equations(
    weights: UnitWeights, units_N2: Tensor, data: LayerData, held: bool | None
) -> NormalEquations:
    """On the documents that judge nothing (False), or on all (None)."""
    device = weights.layer.experts.down_proj.device
    equations = NormalEquations(len(units_N2), weights.layer.info.hidden_size, device)
    for rows in _rows(data, weights.hidden(units_N2), held):
        equations.add(rows)
    return equations


def _screened(weights: UnitWeights, pool_N2: Tensor, data: LayerData, number: int) -> Tensor:
    """Those of many units that alone can say most of what the layer should add, in their order.

    Alone unit n leaves sum w |y|^2 - |sum w z_n y|^2 / sum w z_n^2. One expert at a time, on the
    first SCREENED_BY tokens: never a Gram matrix of all.
    """
    scores = []
    for part in pool_N2[:, 0].unique_consecutive().tolist():
        hidden, seen = weights.hidden(pool_N2[pool_N2[:, 0] == part]), 0
        cross_ID = square_I = torch.zeros(())
        for rows in _rows(data, hidden, held=None):
            weighted_TI = rows.z_TN * rows.weight_T[:, None]
            cross_ID = cross_ID + (weighted_TI.T @ rows.y_TD).double().cpu()
            square_I = square_I + (weighted_TI * rows.z_TN).sum(dim=0).double().cpu()
            seen += len(rows.z_TN)
            if seen >= SCREENED_BY:
                break
        said_I = cross_ID.square().sum(dim=1) / square_I
        scores.append(torch.where(square_I > 0, said_I, 0.0))
    best = torch.cat(scores).argsort(descending=True, stable=True)[:number]
    return pool_N2[best.sort().values]


def _told(fit: Fit) -> Tensors:
    """What is said of a fit, as tensors that can be remembered."""
    ridge = [fit.ridge.strength, float(SCALES.index(fit.ridge.scale))]
    errors = [fit.prior_error, fit.held_error, fit.error]
    return {
        "ridge": torch.tensor(ridge, dtype=torch.float64),
        "errors": torch.tensor(errors, dtype=torch.float64),
    }
