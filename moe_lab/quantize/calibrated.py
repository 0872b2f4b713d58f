"""GPTQ along a checkpoint: each decoder layer on the states behind those already in few bits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from moe_lab.integrity import write_whole
from moe_lab.models.activations import Activations
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.matrices import WeightMatrix
from moe_lab.models.rounding import CLIPS, Clip, Levels, Scheme
from moe_lab.models.stream import LayerStream, States
from moe_lab.option import Option
from moe_lab.profile.routed_tokens import RoutedTokens
from moe_lab.quantize.base import (
    GroupOption,
    QuantizeJob,
    Quantizer,
    Quantizing,
    joined_levels,
    slice_by_slice,
)
from moe_lab.quantize.column_rounding import ACT_ORDERS, DAMPING, LevelChoice
from moe_lab.quantize.expert_levels import levels_of
from moe_lab.quantize.hessians import HESSIAN_WEIGHTS, expert_hessians, linear_hessians

logger = logging.getLogger(__name__)
STARVED = "starved.json"  # by layer, the experts that were rounded to nearest
ClipOption = Annotated[
    str, Option("the range of a group: as it is, or of least squared error", among=CLIPS)
]
SymmetricOption = Annotated[bool, Option("without zero points")]
ActOrderOption = Annotated[
    str,
    Option(
        "of columns: those of the largest inputs first (scales as without), or as they stand",
        among=ACT_ORDERS,
    ),
]
DampingOption = Annotated[
    float, Option("what is added to the Hessian's diagonal, of its mean", above=0)
]
TokenWeightOption = Annotated[
    str,
    Option(
        "of a token in an expert's Hessian: 1, or the square of its router weight",
        among=HESSIAN_WEIGHTS,
    ),
]
LeastTokensOption = Annotated[
    int, Option("an expert with fewer tokens is rounded to nearest", least=1)
]


@dataclass(frozen=True, kw_only=True)
class Compensating(Quantizer):
    """What quantizers have in common that may choose levels by GPTQ."""

    group_size: GroupOption = 128
    symmetric: SymmetricOption = True
    clip: ClipOption = "none"
    act_order: ActOrderOption = "static"
    damping: DampingOption = DAMPING
    token_weight: TokenWeightOption = "none"
    least_tokens: LeastTokensOption = 1

    def given(self, scheme: Scheme) -> LevelChoice:
        """How the levels of a scheme are chosen."""
        clip = cast(Clip, self.clip)
        return LevelChoice(scheme, "full", clip, self.act_order, self.damping)


def opened(job: QuantizeJob, instead: Mapping[str, Tensor] | None = None) -> LayerStream:
    """The checkpoint's decoder layers over the calibration tokens, one in memory at a time.

    instead: what is read for tensors of the files, by their keys, whenever a layer is opened.
    """
    compute, tokens = job.compute, job.tokens
    assert compute is not None and tokens is not None
    limit = int(compute.cache_gib * 2**30)
    cache = Activations(limit, folder=job.folder, device=compute.device)
    model = LayerwiseModel(job.checkpoint, compute.device, instead=instead)
    batches = tokens.batches(compute.batch_size, compute.device, compute.batch_tokens)
    return LayerStream(model, batches, cache)


class Calibrated(Quantizing):
    """GPTQ of every matrix of a job on the tokens that it gets.

    given: how the levels of a scheme are chosen. Experts with fewer tokens than `least_tokens` are
    rounded to nearest, and so is what no token is seen at.
    """

    def __init__(
        self,
        job: QuantizeJob,
        schemes: Mapping[str, Scheme],
        given: Callable[[Scheme], LevelChoice],
        token_weight: str,
        least_tokens: int,
    ):
        self.job, self.schemes, self.given = job, schemes, given
        self.token_weight, self.least_tokens = token_weight, least_tokens
        self.instead: dict[str, Tensor] = {}  # of the last layer that was finished
        self.stream = opened(job, self.instead)
        self.stream.cache.announce({"hidden states": 2 * self.stream.state_bytes()})
        self.states = States(self.stream)

    def layer(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Levels]]:
        """The levels of a layer's matrices, expert by expert."""
        self.states.move_to(index)
        with self.stream.layer(index):
            yield from self._linear(index, [one for one in matrices if not self._routed(one)])
            yield from self._experts(index, [one for one in matrices if self._routed(one)])

    def finished(self, index: int, read: Mapping[str, Tensor]) -> None:
        """What a layer has become; those behind it get its tokens' states."""
        self.states.move_to(index)
        self.instead.clear()
        self.instead.update(read)
        write_whole(self.job.folder / STARVED, json.dumps(self.notes) + "\n")

    def _routed(self, one: WeightMatrix) -> bool:
        return one.part == "experts"

    def _levels(self, weight: Tensor, one: WeightMatrix, hessian_II: Tensor | None) -> Levels:
        found = levels_of(
            weight.to(self.stream.valid[0].device), self.given(self.schemes[one.key]), hessian_II
        )
        zero = None if found.zero_point is None else found.zero_point.cpu()
        return Levels(found.levels.cpu(), found.scale.cpu(), zero)

    def _linear(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Levels]]:
        modules = {one.key: _module(self.stream.model, one) for one in matrices}
        seen = {key: module for key, module in modules.items() if module is not None}
        found = linear_hessians(self.states, index, seen) if seen else {}
        for one in matrices:
            yield one, self._levels(one.load(), one, found.get(one.key))
        if len(found) < len(matrices):
            unseen = [one.key for one in matrices if one.key not in found]
            logger.info("layer %d: no tokens are seen at %s: rounded to nearest", index, unseen)

    @torch.no_grad()
    def _experts(
        self, index: int, matrices: Sequence[WeightMatrix]
    ) -> Iterator[tuple[WeightMatrix, Levels]]:
        """Expert by expert, so that one's Hessians are in memory."""
        if not matrices:
            return
        tokens = RoutedTokens(self.stream.moe[index], self.states)
        apart = {one.key: one for one in matrices if one.expert is not None}
        together = [one for one in matrices if one.expert is None]
        weights = {one.key: list(slice_by_slice(one)) for one in together}
        parts: dict[str, list[Levels]] = {one.key: [] for one in together}
        starved = []
        for expert in range(len(tokens.layer.experts.down_proj)):
            found = expert_hessians(tokens, expert, self.token_weight, self.least_tokens)
            starved += [expert] if found is None else []
            for one in together:
                hessian_II = found and found[one.of_units]
                parts[one.key].append(self._levels(weights[one.key][expert], one, hessian_II))
            for one in (each for each in apart.values() if each.expert == expert):
                yield one, self._levels(one.load(), one, found and found[one.of_units])
        for one in together:
            yield one, joined_levels(parts[one.key], one)
        tokens.close()
        self._note_starved(index, starved)

    def _note_starved(self, index: int, starved: Sequence[int]) -> None:
        if starved:
            logger.info(
                "layer %d: experts %s get fewer than %d tokens of the calibration text: rounded "
                "to nearest", index, list(starved), self.least_tokens,
            )  # fmt: skip
        self.notes[index] = list(starved)

    def figures(self) -> dict[str, float]:
        """How many experts were rounded to nearest for want of tokens."""
        return {"starved_experts": sum(map(len, self.notes.values()))}


def _module(model: nn.Module, one: WeightMatrix) -> nn.Linear | None:
    """The linear module whose weight a matrix is; None where it is no such module's."""
    path, _, kind = one.name.rpartition(".")
    module = model.get_submodule(path)
    return module if isinstance(module, nn.Linear) and kind == "weight" else None
