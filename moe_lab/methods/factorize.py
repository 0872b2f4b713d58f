"""Factorising: all experts stay, and their matrices become factors with fewer parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from moe_lab.chosen import all_options
from moe_lab.lookup import require_kind
from moe_lab.methods.base import LmHead, Method, Mtp
from moe_lab.methods.factorizing.base import (
    FORM_FILES,
    FORMS,
    ExpertMatrices,
    Factorization,
    relative_error,
)
from moe_lab.methods.layer_choice import check_layers
from moe_lab.methods.ratios.budget import GIB, Ratio
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.factorize import FactorizeExperts
from moe_lab.models.edits.keep import KeepLayer
from moe_lab.models.edits.plan import Plan
from moe_lab.models.factorized import GATE_UP_DOWN, factor_name, stacked
from moe_lab.models.factors import Spec, StackShape, num_factor_parameters
from moe_lab.models.stream import LayerStream
from moe_lab.option import Option
from moe_lab.profile.covariances import Covariances, ExpertInputs
from moe_lab.profile.fisher import fisher_means
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress
from moe_lab.types import LayerInfo, UserError


@dataclass(frozen=True)
class Factorize(Method):
    """Write gate, up and down projections of a layer's experts in the factors of one form.

    How many parameters stay is the ratio's: the share of the experts' own that goes, the same in
    every layer, as closely as whole ranks allow and never less. Routers, and which expert a token
    gets, stay as they are. What the result is made of, no family can say: it is in our own form.
    """

    ratio: Annotated[Ratio, Option("the share of the experts' parameters that goes")]
    form: Annotated[
        Factorization | str, Option("which factors, and how they are found", files_of=FORM_FILES)
    ] = "svd"
    layers: Annotated[
        str | Sequence[int], Option("all MoE layers, or a list of decoder layers")
    ] = "all"
    mtp: Mtp = "keep"
    lm_head: LmHead = "auto"

    @functools.cached_property
    def _form(self) -> Factorization:
        return FORMS.made(self.form)

    @property
    def from_routers(self) -> bool:
        """What it needs besides, it measures itself."""
        return True

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse layers that are none, another ratio, and budgets without a rank or a gain."""
        super().check(layers)
        check_layers("factorize", self.layers, 1, ("all",), layers)
        self._check_ratio()
        for info in self._chosen(layers):
            shapes = shapes_of(info)
            self._form.check(shapes)
            self._specs(shapes, self._budget(info, layers))

    def _check_ratio(self) -> None:
        ratio = self.ratio
        require_kind("ratio", ratio, Ratio)
        if not isinstance(ratio, Uniform):
            raise UserError(
                f"{type(ratio).__name__} says how many experts or hidden units each layer keeps, "
                "and method=factorize gives all layers the same share of parameters: ratio=uniform"
            )
        for name, plain in (("floor", None), ("round_to", 1)):
            if getattr(ratio, name) != plain:
                raise UserError(
                    f"ratio.{name} counts experts, and method=factorize removes none: "
                    f"ratio.{name}={'null' if plain is None else plain}"
                )
        if ratio.target_gib is None and not ratio.ratio:
            raise UserError(
                "ratio.ratio=0 takes nothing away, and factors of as many parameters as the "
                "matrices are worse than these: a larger ratio.ratio, or method=none"
            )

    def _chosen(self, layers: Sequence[LayerInfo]) -> list[LayerInfo]:
        chosen = self.layers
        return [info for info in layers if isinstance(chosen, str) or info.index in chosen]

    def _budget(self, info: LayerInfo, layers: Sequence[LayerInfo]) -> int:
        """How many parameters a layer's factors may have."""
        return int(self._share_left(self._chosen(layers)) * parameters_of(info))

    def _share_left(self, chosen: Sequence[LayerInfo]) -> float:
        """The share of the experts' parameters that may stay; UserError where that is none."""
        ratio, first = self.ratio, chosen[0]
        assert isinstance(ratio, Uniform)
        own = sum(map(parameters_of, chosen))
        each = first.neuron_bytes / first.neuron_parameters
        gone = ratio.ratio
        if ratio.target_gib is not None:
            gone = (first.model_bytes - ratio.target_gib * GIB) / (own * each)
        elif ratio.of == "parameters":
            gone = ratio.ratio * first.model_parameters / own
        elif ratio.of == "bytes":
            gone = ratio.ratio * first.model_bytes / (own * each)
        if not 0 < gone < 1:
            raise UserError(
                f"{ratio.request()}: {gone:.1%} of the experts' {own:,} parameters would go, and "
                "more than none and fewer than all have to. The model has "
                f"{first.model_bytes / GIB:.4g} GiB, and these experts {own * each / GIB:.4g} GiB"
            )
        return 1 - gone

    def _specs(self, shapes: Mapping[str, StackShape], budget: int) -> dict[str, Spec]:
        """What each matrix becomes; what one leaves of its budget for want of a whole rank is the
        next one's.
        """
        budgets, left, found = self._form.budgets(shapes, budget), 0, dict[str, Spec]()
        for name in GATE_UP_DOWN:
            found[name] = self._form.spec(name, shapes[name], budgets[name] + left)
            left += budgets[name] - num_factor_parameters(shapes[name], found[name])
        return found

    def example(self, layers: Sequence[LayerInfo]) -> tuple[Edit, ...]:
        """Factors of the plan's sizes; a form may still choose others of as many parameters."""
        return tuple(
            edit_of(info, self._form, self._specs(shapes_of(info), self._budget(info, layers)))
            for info in self._chosen(layers)
        )

    @classmethod
    def settings(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with the form's name and its own options among them."""
        return super().settings(options) | FORMS.described(options.get("form", "svd"))

    @classmethod
    def groups(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The ratio decides its result, too."""
        return ("ratio",)

    def identity(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with the form's own and what counts of the ratio's."""
        form = self._form.identity(all_options(self._form, options.get("form")))
        own = {"form": {"name": self._form.name} | form}
        return super().identity(options) | own | {"ratio": self.ratio.identity(options["ratio"])}

    def parts(self) -> Sequence[object]:
        """The form, which may be given by its name."""
        return [self._form]

    def plan(self, profile: Profile) -> Plan:
        """One edit per MoE layer: factorize, or keep where it is not among `layers`."""
        infos = [one.info for one in profile.statistics]
        chosen = {info.index: info for info in self._chosen(infos)}
        sources = _Sources(profile, self._form)
        tensors: dict[str, Tensor] = {}
        edits: list[Edit] = []
        for info in progress(infos, f"factorize ({self._form.name})"):
            if info.index not in chosen:
                edits.append(KeepLayer(info.index, info.name))
                continue
            edits.append(self._edit(info, self._budget(info, infos), sources, tensors))
        notes = {"form": self._form.name, "statistics": "intact model"}
        return Plan(tuple(edits), notes=notes | self._told(edits, infos), tensors=tensors)

    def _edit(
        self, info: LayerInfo, budget: int, sources: _Sources, tensors: dict[str, Tensor]
    ) -> Edit:
        shapes, specs, errors = shapes_of(info), dict[str, Spec](), list[float]()
        budgets, left = self._form.budgets(shapes, budget), 0
        for matrices in sources.of(info):
            name = matrices.name
            allowed = budgets[name] + left
            fitted = self._form.fit(matrices, self._form.spec(name, shapes[name], allowed), allowed)
            left = allowed - num_factor_parameters(shapes[name], fitted.spec)
            errors.append(relative_error(matrices, fitted))
            specs[name] = fitted.spec
            for factor, tensor in fitted.tensors.items():
                exact = tensor.float() if tensor.is_floating_point() else tensor
                tensors[factor_name(info.index, name, factor)] = exact.contiguous()
        return edit_of(info, self._form, specs, tuple(errors))

    def _told(self, edits: Sequence[Edit], infos: Sequence[LayerInfo]) -> dict[str, Any]:
        """What was asked for and what is given, as the ratio says it."""
        ratio, first = self.ratio, infos[0]
        assert isinstance(ratio, Uniform)
        made = [edit for edit in edits if isinstance(edit, FactorizeExperts)]
        own, left = sum(edit.of for edit in made), sum(edit.parameters for edit in made)
        each = first.neuron_bytes / first.neuron_parameters
        words = {"expert_parameters": f"{own - left:,} of {own:,}"}
        if ratio.target_gib is not None:
            size = (first.model_bytes - (own - left) * each) / GIB
            return {
                "asked": {"target_gib": ratio.target_gib}, "given": {"target_gib": size} | words,
            }  # fmt: skip
        whole = {"parameters": first.model_parameters, "bytes": first.model_bytes}.get(
            ratio.of, own
        )
        size_of_one = each if ratio.of == "bytes" else 1
        share = (own - left) * size_of_one / whole
        return {"asked": {"ratio": ratio.ratio}, "given": {"ratio": share} | words}


def shapes_of(info: LayerInfo) -> dict[str, StackShape]:
    """The shapes (E, O, N) of a layer's gate, up and down projections."""
    number, width, size = info.num_experts, info.expert_width, info.neuron_parameters // 3
    return {
        "gate": (number, width, size), "up": (number, width, size), "down": (number, size, width),
    }  # fmt: skip


def parameters_of(info: LayerInfo) -> int:
    """How many parameters these have together."""
    return info.num_experts * info.expert_width * info.neuron_parameters


def edit_of(
    info: LayerInfo, form: Factorization, specs: Mapping[str, Spec], error: tuple[float, ...] = ()
) -> FactorizeExperts:
    """The edit with these factors."""
    shapes = shapes_of(info)
    number = sum(num_factor_parameters(shapes[name], specs[name]) for name in GATE_UP_DOWN)
    return FactorizeExperts(
        info.index, info.name, form.name, **{name: dict(specs[name]) for name in GATE_UP_DOWN},
        parameters=number, of=parameters_of(info), error=error,
    )  # fmt: skip


class _Sources:
    """The matrices of one layer after another, with what the form wants to know beside them."""

    def __init__(self, profile: Profile, form: Factorization):
        self._means = fisher_means(profile, form.num_samples) if form.needs_fisher else {}
        self._inputs = (
            ExpertInputs(profile, form.num_samples, form.gated, form.token_weight)
            if form.needs_inputs
            else None
        )
        self._stream: LayerStream = self._inputs.stream if self._inputs else profile.open_stream(1)

    def of(self, info: LayerInfo) -> Iterator[ExpertMatrices]:
        """Gate, up and down of a layer, in this order."""
        sums = self._inputs.of(info.index) if self._inputs else None
        with self._stream.layer(info.index):
            experts = self._stream.moe[info.index].experts
            weights = {name: one.detach() for name, one in stacked(experts).items()}
            weights = {name: one.to("cpu", torch.float64) for name, one in weights.items()}
        for place, (name, weight) in enumerate(weights.items()):
            yield ExpertMatrices(
                name, weight, _covariance(sums, name), sums.count if sums else None,
                self._means.get(info.index, {}).get(name), seed=3 * info.index + place,
            )  # fmt: skip


def _covariance(sums: Covariances | None, name: str) -> Tensor | None:
    if sums is None:
        return None
    return sums.hidden if name == "down" else sums.inputs
