"""The errors of experts or layers in each number of bits, over a whole checkpoint, kept by layer.

Each is measured in the intact model: the states before a layer are those of the checkpoint as it
is, whatever the layers before it will be stored in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_lab.integrity import write_whole
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.narrowing import Cut
from moe_lab.models.rounding import Scheme
from moe_lab.models.stream import States
from moe_lab.profile.intact_predictions import IntactPredictions
from moe_lab.profile.routed_tokens import RoutedTokens
from moe_lab.progress import progress
from moe_lab.quantize.base import QuantizeJob
from moe_lab.quantize.calibrated import opened
from moe_lab.quantize.column_rounding import LevelChoice
from moe_lab.quantize.error_curves import ExpertLevels, expert_errors, layer_errors
from moe_lab.quantize.expert_levels import expert_levels
from moe_lab.quantize.hessians import expert_hessians

CURVES = "curves"  # a file a layer: its experts' errors, or its own, in each number of bits
Measured = dict[int, list[list[float]]]  # by layer: [experts or 1][bits]


@dataclass(frozen=True)
class ErrorsInBits:
    """How errors are measured.

    given: how levels are chosen in each number of bits; compensated: by GPTQ on the calibration
    tokens, else rounded to nearest. by: expert or layer. token_weight: what a token weighs in an
    error, hessian_weight in an expert's Hessian.
    """

    given: Sequence[LevelChoice]
    by: str
    compensated: bool
    token_weight: str
    hessian_weight: str
    least_tokens: int

    def outputs(self, job: QuantizeJob) -> Measured:
        """The error of what leaves each layer; see `error_curves.py`."""
        folder = job.folder / CURVES
        folder.mkdir(exist_ok=True)
        stream = opened(job)
        states, found = States(stream), Measured()
        dtypes = {one.layer: one.dtype for one in job.chosen}
        for index in progress(sorted(dtypes), "errors of layers in few bits"):
            file = folder / f"{index}.json"
            if not file.is_file():
                states.move_to(index)
                with stream.layer(index):
                    errors = self._of_layer(stream.moe[index], states, dtypes[index])
                write_whole(file, json.dumps(errors) + "\n")
            found[index] = json.loads(file.read_text())
        return found

    @torch.no_grad()
    def _of_layer(self, layer: MoELayer, states: States, dtype: torch.dtype) -> list[list[float]]:
        weight = self.token_weight
        tokens = RoutedTokens(layer, states, weight)
        experts = range(len(layer.experts.down_proj))
        if self.by == "expert":
            errors = [
                expert_errors(tokens, e, tokens.of(e), self._levels(tokens, e, self.given, dtype))
                for e in experts
            ]
        else:
            every = []
            for given in self.given:  # one after another: all experts' levels are in memory
                candidate = [self._levels(tokens, e, [given], dtype)[0] for e in experts]
                every += layer_errors(tokens, states, [candidate], weight)
            errors = [every]
        tokens.close()
        return errors

    def _levels(
        self, tokens: RoutedTokens, expert: int, given: Sequence[LevelChoice], dtype: torch.dtype
    ) -> list[ExpertLevels]:
        hessians = None
        if self.compensated:
            weight, least = self.hessian_weight, self.least_tokens
            hessians = expert_hessians(tokens, expert, weight, least)
        return [expert_levels(tokens.layer, expert, one, hessians, dtype) for one in given]


def predictions(job: QuantizeJob, schemes: Sequence[Scheme], num_samples: int) -> Measured:
    """KL(intact || with one layer's experts in so many bits), nats a token; rounded to nearest.

    On the first `num_samples` calibration samples. What is measured of a layer is kept.
    """
    folder = job.folder / CURVES
    folder.mkdir(exist_ok=True)
    layers = sorted({one.layer for one in job.chosen})
    files = {index: folder / f"{index}.json" for index in layers}
    if not all(file.is_file() for file in files.values()):
        intact = _intact(job, num_samples)
        cuts = {layer.info.index: _whole(layer) for layer in moe_layers(intact.model)}
        for index in progress(layers, "divergence with a layer in few bits"):
            if not files[index].is_file():
                cut = cuts[index]
                errors = [intact.divergence({index: cut._replace(scheme=one)}) for one in schemes]
                write_whole(files[index], json.dumps([errors]) + "\n")
    return {index: json.loads(file.read_text()) for index, file in files.items()}


def _intact(job: QuantizeJob, num_samples: int) -> IntactPredictions:
    compute, tokens = job.compute, job.tokens
    assert compute is not None and tokens is not None
    sample = tokens.take(range(len(tokens.samples))[:num_samples])
    batches = sample.batches(compute.batch_size, compute.device, compute.batch_tokens)
    return IntactPredictions(job.checkpoint.load(compute.device), batches)


def _whole(layer: MoELayer) -> Cut:
    info = layer.info
    neurons = torch.ones(len(layer.experts.down_proj), info.expert_width, dtype=torch.bool)
    return Cut(tuple(range(info.num_experts)), neurons)
