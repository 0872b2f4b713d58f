"""Condensed layers in closed form (`solving.py`), alone or behind those condensed before them.

Each is remembered when it is found, so that a stopped plan goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.methods.condense.expert_choice import ExpertChoices
from moe_lab.methods.condense.layer_data import OwnText, Walk
from moe_lab.methods.condense.layer_search import CondensedSets
from moe_lab.methods.condense.solving import AskedRefit, Solver
from moe_lab.methods.ridge import SCALES
from moe_lab.models.dense_units import (
    SHARED_PART,
    columns_name,
    rows_name,
    units_name,
)
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.condense_units import CondenseUnits
from moe_lab.models.stream import LayerStream
from moe_lab.profile.documents import check_enough, to_fit_and_choose
from moe_lab.profile.own_text import with_own_text
from moe_lab.profile.profile import Answer, Profile, Tensors
from moe_lab.progress import progress

REFITS = ("none", "gates", "down_proj")


class Refits:
    """Layers condensed in closed form, each fitted when it is first asked for and remembered."""

    def __init__(self, method: AskedRefit, profile: Profile, choices: ExpertChoices):
        check_enough(profile.num_documents)
        self.method, self.profile, self.choices = method, profile, choices
        self.solver = Solver(method, choices)
        self.own: OwnText | None = None
        if method.own_documents:
            self.own = OwnText(profile.num_documents, method.own_weight)
            self.profile = with_own_text(profile, method.own_documents)
        by_name = isinstance(method.experts, str)
        self._identity = {
            "experts": method.experts if by_name else list(method.experts),
            "options": [method.num_routed, method.width, method.gates, method.seed],
            "refit": [method.refit, method.token_weight, method.ridge],
            "own text": [method.own_documents, self.own],
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
        steps: int = 0,
    ) -> tuple[dict[int, Edit], Tensors]:
        """Edits that condense these layers, by index, and what they need of the plan's tensors.

        documents: on which they are fitted, by their places in the calibration set; None: all.
        steps: that each takes behind its closed form (`layer_fit`).
        """
        walker = _Walker(self, propagate, documents, steps)
        edits: dict[int, Edit] = {}
        tensors: Tensors = {}
        for index in progress(sorted(indices), "condense: fitting layers"):
            behind = [] if propagate == "none" else list(edits)
            question = self._identity | {
                "question": "condensed layer", "layer": index, "behind": behind,
                "propagate": propagate, "documents": documents,
            } | ({"steps": steps} if steps else {})  # fmt: skip

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
        moved = [name for name in ("gate_proj", "up_proj") if name in found]
        tensors |= {rows_name(index, name): found[name] for name in moved}
        parts = Counter(units_W2[:, 0].tolist())
        shared = parts.pop(SHARED_PART, 0)
        most = sorted(parts.items(), key=lambda one: (-one[1], one[0]))
        return CondenseUnits(
            index, info.name, len(units_W2),
            experts=tuple(expert for expert, _ in most),
            units=tuple(number for _, number in most),
            shared_units=shared,
            fitted="all" if moved else "down_proj",
            steps=int(found.get("steps", 0)),
            ridge=_words(found["ridge"]),
            errors=tuple(found["errors"].tolist()),
        )  # fmt: skip


class _Walker:
    """Goes through the layers only as far as something is not remembered."""

    def __init__(self, refits: Refits, propagate: str, documents: Sequence[int] | None, steps: int):
        self.refits, self.propagate, self.documents = refits, propagate, documents
        self.steps = steps
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
                return self.refits.solver.solve(stream.moe[index], data, self.steps)
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


def _words(ridge_2: Tensor) -> str:
    strength, scale = ridge_2.tolist()
    return f"{strength:.3g} of the {SCALES[int(scale)]}"
