"""Errors of sets of experts by pruning copies of a model, slow and sure."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from families import tiny_batch, tiny_model
from torch import Tensor, nn

from moe_lab.methods.metrics.naee import subsets
from moe_lab.models.editing import prune_layer
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile

LAYER = 2


class Case:
    """A model in float64, its batches (with padding), statistics, and inputs of one MoE block."""

    def __init__(self, family: str, **changes: object):
        self.model = tiny_model(family, **changes).double()
        self.model.set_experts_implementation("eager")  # the default one knows no float64
        self.batches = [tiny_batch(seed=seed) for seed in (0, 1)]
        self.statistics = collect_statistics(self.model, self.batches)
        self.infos = {layer.info.index: layer.info for layer in self.statistics}

    def profile(self) -> Profile:
        return Profile(self.statistics, lambda number=None: LayerStream(self.model, self.batches))

    @property
    def exact(self) -> float:
        """The relative error of sums in float64, but for routers that compute in float32."""
        return 1e-7 if self.model.config.model_type == "deepseek_v3" else 1e-10

    @functools.cache  # noqa: B019
    def inputs(self, index: int) -> Tensor:
        """What the block of a layer gets, valid tokens only."""
        found = []
        block = {layer.info.index: layer for layer in moe_layers(self.model)}[index].block
        handle = block.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        with torch.no_grad():
            for batch in self.batches:
                self.model(**batch)
        handle.remove()
        valid = [batch["attention_mask"].bool() for batch in self.batches]
        return torch.cat([x[mask] for x, mask in zip(found, valid, strict=True)])


@torch.no_grad()
def routed_output(model: nn.Module, index: int, x_TD: Tensor) -> Tensor:
    """What a block adds beside its shared expert."""
    layer = {layer.info.index: layer for layer in moe_layers(model)}[index]
    out = hidden_of(layer.block(x_TD[None]))[0]
    if layer.shared is not None:
        gate = 1.0 if layer.shared_gate is None else layer.shared_gate(x_TD).sigmoid()
        out = out - gate * layer.shared(x_TD)
    return out


def pruned(model: nn.Module, index: int, kept: Sequence[int]) -> nn.Module:
    changed = copy.deepcopy(model)
    prune_layer({layer.info.index: layer for layer in moe_layers(changed)}[index], list(kept))
    return changed


def slow_error(case: Case, index: int, kept: Sequence[int]) -> tuple[float, float]:
    """Of a copy of the model that is really pruned, on the same inputs."""
    x_TD = case.inputs(index)
    intact = routed_output(case.model, index, x_TD)
    changed = routed_output(pruned(case.model, index, kept), index, x_TD)
    return distances(changed, intact)


def distances(changed: Tensor, intact: Tensor) -> tuple[float, float]:
    squared = [float(((a - b) ** 2).sum()) for a, b in zip(changed, intact, strict=True)]
    cosine = [
        1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(changed, intact, strict=True)
    ]
    return sum(squared) / len(squared), sum(cosine) / len(cosine)


def some_sets(case: Case, index: int) -> list[tuple[int, ...]]:
    """Sets of several sizes that the layer's router can work with."""
    info = case.infos[index]
    sizes = (4, 6, 8) if info.groups > 1 else (info.top_k, 5, 7, 8)
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        every = list(subsets(info, size))
        found += [every[i] for i in torch.randperm(len(every), generator=generator)[:3].tolist()]
    return found


def routed_with_logits_masked(layer, x_TD: Tensor, kept: Sequence[int]) -> Tensor:
    """The routed sum, token by token, of each family's router written out with -inf logits."""
    gone = [expert for expert in range(8) if expert not in kept]
    family, router = layer.info.family, layer.router
    logits = x_TD @ router.weight.T
    logits[:, gone] = -torch.inf
    if family == "deepseek_v3":
        score = logits.sigmoid()
        choice = score + router.e_score_correction_bias
        choice[:, gone] = -torch.inf
        groups = choice.view(-1, 2, 4)
        best = groups.topk(2, dim=-1)[0].sum(dim=-1).argmax(dim=-1)
        choice[torch.arange(8) // 4 != best[:, None]] = -torch.inf
    else:
        score = choice = logits.softmax(dim=-1)
    index = choice.topk(layer.info.top_k, dim=-1)[1]
    weight = score.gather(1, index)
    if family in ("mixtral", "deepseek_v3"):
        weight = weight / weight.sum(dim=-1, keepdim=True)
    if family == "deepseek_v3":
        weight = weight * 2.5
    experts, rows = layer.experts, []
    for x, indices, weights in zip(x_TD, index.tolist(), weight, strict=True):
        row = torch.zeros_like(x)
        for expert, share in zip(indices, weights, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            row += share * (experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def slow_masked_error(case: Case, index: int, kept: Sequence[int]) -> tuple[float, float]:
    layer = {layer.info.index: layer for layer in moe_layers(case.model)}[index]
    x_TD = case.inputs(index)
    every = routed_with_logits_masked(layer, x_TD, range(8))
    return distances(routed_with_logits_masked(layer, x_TD, kept), every)
