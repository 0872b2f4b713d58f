"""What a quantizer is: from a checkpoint to the levels of its matrices, a decoder layer at a time.

The stage finds the matrices, asks a quantizer to begin, and then for one decoder layer after
another; it writes, reads back and compares. A quantizer that needs text says so (`needs_text`) and
finds the calibration samples in its job; what it has found of a layer is kept until the checkpoint
is whole, so that a killed run goes on behind the last finished layer.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import WeightMatrices, WeightMatrix, What
from moe_lab.models.packed_form import packed_form, vllm_obstacle
from moe_lab.models.packed_writing import WrittenForm
from moe_lab.models.quantised import stored_in_few_bits
from moe_lab.models.rounding import BITS, Levels, Reads, Scheme
from moe_lab.option import Option, Plugin, check_options
from moe_lab.types import UserError

WhatOption = Annotated[
    str,
    Option(
        "which matrices: of routed experts; of dense layers and shared experts; of attention; all "
        "in decoder layers but routers and gates",
        among=get_args(What),
    ),
]
BitsOption = Annotated[int, Option("of a weight", least=min(BITS), most=max(BITS))]
GroupOption = Annotated[
    int | None, Option("inputs that share a scale, null for all of an output's", least=2)
]


@dataclass(frozen=True)
class QuantizeJob:
    """What a quantizer works on.

    checkpoint: its source, whole and unquantised; matrices: all there are in it, chosen: those that
    it is to pack. folder: its own, for what it keeps over attempts. tokens, compute: the
    calibration text and how to compute, None where it needs no text.
    """

    checkpoint: Checkpoint
    matrices: WeightMatrices
    chosen: Sequence[WeightMatrix]
    folder: Path
    tokens: Tokens | None = None
    compute: Compute | None = None

    def alike(self, scheme: Scheme) -> dict[str, Scheme]:
        """One scheme for all chosen matrices, by their keys."""
        return {one.key: scheme for one in self.chosen}


class Quantizing(ABC):
    """A quantizer at work on one checkpoint.

    schemes: of each matrix that it packs, by its key: all are known when it begins.
    notes: what is to be told of decoder layers, by their numbers, in the words of JSON. Of layers
    that an earlier attempt finished they are those of then.
    """

    schemes: Mapping[str, Scheme]

    @functools.cached_property
    def notes(self) -> dict[int, Any]:
        """None at first."""
        return {}

    @abstractmethod
    def layer(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Levels]]:
        """The levels of each of the matrices of a decoder layer, in any order.

        Layers come in order; of an attempt that goes on those that are finished are left out.
        """

    def finished(  # nothing is to be done by default
        self, index: int, read: Mapping[str, torch.Tensor]
    ) -> None:
        """A decoder layer is written, now or by an earlier attempt; called of each in order.

        read: what readers make of its matrices, by their keys, as the files had them before.
        """
        del index, read  # only those that look at text ask

    def figures(self) -> dict[str, float]:
        """What a report says of it, by name; asked in the end."""
        return {}


class Quantizer(Plugin, ABC):
    """A way to store a checkpoint's matrices in few bits; its options are its fields.

    `begin` has to be there. What else may be:
    what: which matrices; by default those of experts.
    needs_text: whether it looks at the calibration text; by default false.
    check(matrices): refuses, with a UserError before any work, matrices that it cannot pack, as far
    as they are known then; by default values that are out of the range of their `Option`.
    scheme: that of every matrix where it is one and known before, else None; by it the form and
    what serves it are told before any work.
    reader(layer): what makes of a weight what a reader will, where that needs no text: by it
    experts are tuned as they will be stored; by default None.
    check_size(chosen): refuses, with a UserError, matrices that a budget has no room for, once
    these are all there are; by default nothing.
    follows_plan: whether it stores what the run's plan decides; by default false.
    obeying(notes): the quantizer that follows what a plan's notes say; by default itself.
    packs(matrix): whether it packs one of those that `what` asks for; by default it does.
    form(job, quantizing): how what it finds is written; by default packed whole numbers.
    identity(options): what of its composed options the result depends on; by default all.
    """

    what: str = "experts"

    @property
    def needs_text(self) -> bool:
        """Whether it looks at the calibration text."""
        return False

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of every matrix; None where it is not one, or not known before."""
        return None

    @abstractmethod
    def begin(self, job: QuantizeJob) -> Quantizing:
        """Decide the scheme of each matrix."""

    def chosen(self, matrices: WeightMatrices) -> list[WeightMatrix]:
        """The matrices that it packs; UserError where there are none."""
        chosen = [one for one in matrices.chosen(self.what) if self.packs(one)]
        if not chosen:
            there = sorted({one.part for one in matrices.every} - {"other"})
            raise UserError(
                f"quantize.what={self.what}: the model has no such matrices; it has those of "
                f"{', '.join(there)}"
            )
        return chosen

    def check(self, matrices: Sequence[WeightMatrix]) -> None:
        """Refuse matrices that it cannot pack, before any work."""
        check_options(self, "quantize")
        if self.scheme is not None:
            check_groups(matrices, self.scheme)

    def reader(self, layer: int) -> Reads | None:
        """What makes of a weight [..., out, in] what a reader will; None where text decides."""
        return None

    def check_size(self, chosen: Sequence[WeightMatrix]) -> None:
        """Refuse a budget that has no room for these matrices, which are all that are packed."""
        del chosen  # only those with a budget ask

    @property
    def follows_plan(self) -> bool:
        """Whether it stores what the run's plan decides."""
        return False

    def obeying(self, notes: Mapping[str, Any]) -> Quantizer | None:
        """What follows the notes of the run's plan; None where these leave nothing to pack."""
        return self

    def packs(self, matrix: WeightMatrix) -> bool:
        """Whether one of the matrices that `what` asks for is packed."""
        return True

    def form(self, job: QuantizeJob, quantizing: Any) -> WrittenForm:
        """How what it finds is written."""
        return packed_form(job.checkpoint, job.matrices, quantizing.schemes)

    def announced(self, checkpoint: Checkpoint, matrices: WeightMatrices) -> list[str]:
        """What is said before any work: the form, and whether vLLM reads it."""
        chosen = matrices.chosen(self.what)
        if self.scheme is None:
            return []
        schemes = {one.key: self.scheme for one in chosen}
        told = [f"quantized, it will be {packed_form(checkpoint, matrices, schemes).reason}"]
        experts = [one for one in chosen if one.part == "experts"]
        if experts and (obstacle := vllm_obstacle(experts, self.scheme)):
            told.append(f"vLLM will not read it: {obstacle}")
        return told


def check_unquantised(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is in few bits already: rounding twice loses twice."""
    kind = stored_in_few_bits(checkpoint.config)
    if kind:
        raise UserError(
            f"{checkpoint.path} is stored in {kind} already, and quantize rounds what is not. Give "
            "the unquantised weights, or let a method or recipe make others of it, which are "
            "dequantised; quantize=none keeps it as it is"
        )


def check_groups(matrices: Sequence[WeightMatrix], scheme: Scheme) -> None:
    """Refuse groups that do not divide the inputs of a matrix, with those that divide all."""
    size = scheme.group_size
    odd = next((one for one in matrices if size and one.width % size), None)
    if odd is None:
        return
    widths = {one.width for one in matrices}
    fit = [str(n) for n in (256, 128, 64, 32, 16, 8) if not any(width % n for width in widths)]
    raise UserError(
        f"quantize.group_size={size} does not divide the {odd.width} inputs of {odd.key}; what "
        f"divides those of all matrices: {', '.join([*fit, 'null (one scale for each output)'])}"
    )


def slice_by_slice(one: WeightMatrix) -> Iterator[torch.Tensor]:
    """The matrices [out, in] of each expert in a tensor of all, or the one that it is."""
    weight = one.load()
    yield from weight if weight.dim() == 3 else (weight,)


def joined_levels(parts: Sequence[Levels], matrix: WeightMatrix) -> Levels:
    """The levels of a tensor from those of its slices."""
    if len(matrix.shape) == 2:
        return parts[0]
    zeros = [one.zero_point for one in parts if one.zero_point is not None]
    return Levels(
        torch.stack([one.levels for one in parts]),
        torch.stack([one.scale for one in parts]),
        torch.stack(zeros) if zeros else None,
    )
