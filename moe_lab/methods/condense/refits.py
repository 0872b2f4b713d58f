"""Condensed layers in closed form: which hidden units, and the down projection that suits them.

A dense layer is linear in its down projection: given what its hidden units z compute for each
token, the columns W that bring it closest to what the layer should add, y, solve

    sum over tokens of w_t ||W z_t - y_t||^2 + sum over units of lambda_n ||W_n - P_n||^2,

P the columns that the constant gates give (CD-MoE, 2412.00069): a strong ridge returns the paper's
layer. How strong it is, the held-out documents say (`least_squares.fitted`). What y is, and w_t,
says `layer_data.Walk`. Ours; the paper refits nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_lab.methods.condense.base import (
    UnitCandidates,
    choice_named,
    chooses_units,
    shared_gate,
)
from moe_lab.methods.condense.expert_choice import Asked, ExpertChoices
from moe_lab.methods.condense.layer_data import LayerData, OwnText, Walk
from moe_lab.methods.condense.layer_search import CondensedSets
from moe_lab.methods.least_squares import Fit, NormalEquations, TokenRows, fitted
from moe_lab.methods.ridge import RIDGES, SCALES, Ridge
from moe_lab.models.dense_units import (
    SHARED,
    UnitWeights,
    all_units,
    columns_name,
    units_name,
)
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.condense_units import CondenseUnits
from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import MoELayer
from moe_lab.models.stream import LayerStream
from moe_lab.profile.documents import check_enough, to_fit_and_choose
from moe_lab.profile.own_text import with_own_text
from moe_lab.profile.profile import Answer, Profile, Tensors
from moe_lab.progress import progress
from moe_lab.types import LayerInfo

REFITS = ("none", "gates", "down_proj")
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

    @property
    def propagated(self) -> str:
        """none, block or residual."""
        ...


class Refits:
    """Layers condensed in closed form, each fitted when it is first asked for and remembered."""

    def __init__(self, method: AskedRefit, profile: Profile, choices: ExpertChoices):
        check_enough(profile.num_documents)
        self.method, self.profile, self.choices = method, profile, choices
        self.own: OwnText | None = None
        if method.own_documents:
            self.own = OwnText(profile.num_documents, method.own_weight)
            self.profile = with_own_text(profile, method.own_documents)
        by_name = isinstance(method.experts, str)
        self._identity = {
            "experts": method.experts if by_name else list(method.experts),
            "options": [method.num_routed, method.width, method.gates, method.seed],
            "refit": [method.refit, method.token_weight, method.ridge, self.own],
        }

    def candidates(self) -> CondensedSets:
        """The model with any set of its layers condensed, on documents that nothing was fitted to.

        Each layer is fitted in the intact model, to the other documents.
        """
        fit, choose = to_fit_and_choose(self.profile.num_documents)
        edits, tensors = self.fitted(self.choices.statistics, "none", fit)
        opened = functools.cache(lambda: self.choices.opened(choose, self.profile))
        return CondensedSets(opened, edits, self.remember(fit), tensors)

    def remember(
        self, documents: Sequence[int] | None
    ) -> Callable[[dict[str, Any], Callable[[], Answer]], Answer]:
        """Remembers what is asked of candidates that were fitted on these documents."""

        def remembered(identity: dict[str, Any], work: Callable[[], Answer]) -> Answer:
            known_by = self._identity | {"fitted on": documents} | identity
            return self.profile.remember(known_by, work, [Refits, *self.method.searches()])

        return remembered

    def fitted(
        self,
        indices: Iterable[int],
        propagate: str,
        documents: Sequence[int] | None = None,
    ) -> tuple[dict[int, Edit], Tensors]:
        """Edits that condense these layers, by index, and what they need of the plan's tensors.

        documents: on which they are fitted, by their places in the calibration set; None: all.
        """
        walker = _Walker(self, propagate, documents)
        edits: dict[int, Edit] = {}
        tensors: Tensors = {}
        for index in progress(sorted(indices), "condense: fitting layers"):
            behind = [] if propagate == "none" else list(edits)
            question = self._identity | {
                "question": "condensed layer", "layer": index, "behind": behind,
                "propagate": propagate, "documents": documents,
            }  # fmt: skip

            def work(index: int = index) -> Tensors:
                return walker.fit(index, edits, tensors)

            found = self.profile.remember_tensors(question, work, [Refits, *self.method.searches()])
            edits[index] = self._edit(index, found, tensors)
        return edits, tensors

    def _edit(self, index: int, found: Tensors, tensors: Tensors) -> Edit:
        """The edit that says what was found, and what it needs in `tensors`."""
        info = self.choices.statistics[index].info
        if "gates" in found:
            edit = self.choices.edits([index])[index]
            gates = found["gates"].tolist()
            shared = gates.pop(0) if info.shared else edit.shared_gate
            return dataclasses.replace(edit, gates=tuple(gates), shared_gate=shared)
        units_W2 = found["units"]
        tensors[units_name(index)] = units_W2
        tensors[columns_name(index)] = found["down_proj"]
        parts = Counter(units_W2[:, 0].tolist())
        shared = parts.pop(SHARED, 0)
        most = sorted(parts.items(), key=lambda one: (-one[1], one[0]))
        return CondenseUnits(
            index, info.name, len(units_W2),
            experts=tuple(expert for expert, _ in most),
            units=tuple(number for _, number in most),
            shared_units=shared,
            ridge=_words(found["ridge"]),
            errors=tuple(found["errors"].tolist()),
        )  # fmt: skip

    # ------------------------------------------------------------------ one layer

    def solve(self, layer: MoELayer, data: LayerData) -> Tensors:
        """What becomes of a layer whose weights are in memory."""
        if self.method.refit == "gates":
            return self._gates(layer, data)
        weights = UnitWeights(layer)
        units_N2, equations = self._units(weights, data)
        prior_ND = self._columns(weights, units_N2)
        hidden = weights.hidden(units_N2)
        fit = fitted(equations, lambda: _rows(data, hidden, True), prior_ND, self._ridges())
        return {
            "units": units_N2.to("cpu", torch.int32),
            "down_proj": fit.columns_ND.T.float().cpu(),
        } | _told(fit)

    def _ridges(self) -> Sequence[Ridge]:
        return RIDGES if self.method.ridge is None else [Ridge(self.method.ridge, "mean")]

    def _units(self, weights: UnitWeights, data: LayerData) -> tuple[Tensor, NormalEquations]:
        """The hidden units that stay, and their equations on the documents that judge nothing."""
        info = weights.layer.info
        if not chooses_units(self.method.experts):
            units_N2 = all_units(info, self.choices.edits([info.index])[info.index].experts)
            return units_N2, _equations(weights, units_N2, data)
        width = self.method.width or width_of(info, self.method.num_routed)
        pool_N2 = all_units(info)
        if len(pool_N2) > max(CANDIDATES, 2 * width):
            pool_N2 = _screened(weights, pool_N2, data, max(CANDIDATES, 2 * width))
        equations = _equations(weights, pool_N2, data)
        candidates = UnitCandidates(
            pool_N2, equations, self._columns(weights, pool_N2), width, self.method.num_routed
        )
        choose = choice_named("experts", str(self.method.experts))
        places: Tensor = choose(candidates)
        return pool_N2[places.cpu()], equations.of(places)

    def _columns(self, weights: UnitWeights, units_N2: Tensor) -> Tensor:
        """The columns [N, D] that constant gates give hidden units."""
        statistics = self.choices.statistics[weights.layer.info.index]
        gates_E: Tensor = choice_named("gates", self.method.gates)(statistics).double()
        expert_N = units_N2[:, 0]
        gate_N = gates_E[expert_N.clamp(min=0)]
        gate_N[expert_N == SHARED] = shared_gate(statistics)
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
                z_NP = torch.stack(parts, dim=-1).flatten(0, 1)
                weight_N = chunk.weight_T.repeat_interleave(chunk.target_TD.shape[1])
                yield TokenRows(z_NP, chunk.target_TD.flatten()[:, None], weight_N)

        shared = [] if layer.shared is None else [edit.shared_gate]
        prior_P1 = torch.tensor([*shared, *edit.gates], dtype=torch.float64)[:, None]
        equations = NormalEquations(len(prior_P1), 1, layer.experts.down_proj.device)
        for one in rows(held=False):
            equations.add(one)
        prior_P1 = prior_P1.to(equations.gram_NN)
        fit = fitted(equations, lambda: rows(held=True), prior_P1, self._ridges())
        return {"gates": fit.columns_ND[:, 0].double().cpu()} | _told(fit)


class _Walker:
    """Goes through the layers only as far as something is not remembered."""

    def __init__(self, refits: Refits, propagate: str, documents: Sequence[int] | None):
        self.refits, self.propagate, self.documents = refits, propagate, documents
        self._stream: LayerStream | None = None
        self._walk: Walk | None = None
        self._passed: set[int] = set()

    @torch.no_grad()
    def fit(self, index: int, edits: Mapping[int, Edit], tensors: Tensors) -> Tensors:
        """What becomes of layer `index` behind the layers of `edits`."""
        walk = self._opened()
        stream = walk.stream
        for before in sorted(set(edits) - self._passed) if self.propagate != "none" else ():
            with stream.layer(before):
                walk.condense(before, edits[before].apply(stream.moe[before], tensors))
            self._passed.add(before)
        with stream.layer(index):
            data = walk.data(index)
            try:
                return self.refits.solve(stream.moe[index], data)
            finally:
                data.close()

    def _opened(self) -> Walk:
        if self._walk is None:
            method = self.refits.method
            stream = self.refits.profile.open_stream(documents=self.documents)
            stream.cache.announce(
                {"states of the layers that are fitted": 6 * stream.state_bytes()}
            )
            if self.propagate != "none":
                stream.check_hidden_alone(
                    "layers behind condensed ones cannot be fitted: condense.propagate=none"
                )
            own = self.refits.own
            self._walk = Walk(stream, self.propagate, method.token_weight, own)
        return self._walk


def width_of(info: LayerInfo, num_routed: int) -> int:
    """How wide the layer is with its shared experts and so many routed ones."""
    return info.shared_width * info.shared + num_routed * info.expert_width


def _rows(data: LayerData, hidden: Callable[[Tensor], Tensor], held: bool) -> Iterator[TokenRows]:
    for chunk in data.chunks(held):
        yield TokenRows(hidden(chunk.x_TD), chunk.target_TD, chunk.weight_T)


def _equations(weights: UnitWeights, units_N2: Tensor, data: LayerData) -> NormalEquations:
    """On the documents that judge nothing."""
    device = weights.layer.experts.down_proj.device
    equations = NormalEquations(len(units_N2), weights.layer.info.hidden_size, device)
    for rows in _rows(data, weights.hidden(units_N2), held=False):
        equations.add(rows)
    return equations


def _screened(weights: UnitWeights, pool_N2: Tensor, data: LayerData, number: int) -> Tensor:
    """Those of many units that alone can say most of what the layer should add, in their order.

    Alone unit n leaves sum w |y|^2 - |sum w z_n y|^2 / sum w z_n^2. One expert at a time, on the
    first SCREENED_BY tokens that judge nothing: never a Gram matrix of all.
    """
    scores = []
    for part in pool_N2[:, 0].unique_consecutive().tolist():
        hidden, seen = weights.hidden(pool_N2[pool_N2[:, 0] == part]), 0
        cross_ID = square_I = torch.zeros(())
        for rows in _rows(data, hidden, held=False):
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


def _words(ridge_2: Tensor) -> str:
    strength, scale = ridge_2.tolist()
    return f"{strength:.3g} of the {SCALES[int(scale)]}"
