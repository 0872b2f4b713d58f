"""What one pass over the calibration set collects at each MoE layer.

Every statistic is a sum in float64 over valid tokens, so that sums of batches, processes and
restarts add up to the same values; nothing is divided before a metric needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moe_lab.moe import MoELayer, moe_layers
from moe_lab.observing import (
    AllRouted,
    Observation,
    RoutersObservation,
    observe,
    observe_routers,
)
from moe_lab.routing import SCORINGS, matching_scoring, scoring
from moe_lab.types import LayerInfo, Routing, UserError

# Known only where the router's scoring is; and what is no sum over tokens.
OF_PROBABILITY = ("probability_sum", "entropy_sum")
CONSTANTS = ("router_norm",)
GROUPS = "groups.json"


class LayerStatistics:
    """The sums of one layer.

    Of the router alone. Per expert [E]: count, tokens that the router sent to it; gate_sum, of its
    router weight over them; probability_sum, of the router's full probability over all tokens
    (SEER-MoE 2404.05089, soft count); router_norm, no sum but the l2 norm of its router row. Per
    pair of experts [E, E]: logit_product_sum, of the products of their router logits. Per place in
    a token's choice, heaviest first: rank_count [K, E], tokens that gave each expert this place;
    rank_share_sum [K], of the share that the weight there has of the token's. Scalars [1]: tokens;
    entropy_sum, of the entropy in nats of the full probability (scores that do not add up to 1 are
    divided by their sum first).

    Of the experts and what is around them. Per expert [E]: norm_sum, of the l2 norm of its output;
    gate_norm_sum, of weight times norm. Scalars [1]: shared_gate_sum, of the shared expert's
    sigmoid gate over all tokens; block_cosine_sum and layer_cosine_sum, of the cosine between what
    enters and what leaves the decoder layer, or its MoE sublayer alone (x and x + MoE(norm(x)); He
    et al. 2406.02500).
    """

    def __init__(
        self,
        info: LayerInfo,
        sums: dict[str, Tensor] | None = None,
        scoring: str | None = None,
    ):
        self.info = info
        self.sums = sums or {}
        self.scoring = scoring  # None: found by looking at the first batch

    def add(self, routing: Routing) -> None:
        """Add one batch."""
        self.add_routed(routing.logits_TE, routing.index_TK, routing.weight_TK)
        # Norms of half-precision outputs would overflow and round: at least float32 is used.
        exact = torch.promote_types(routing.y_SD.dtype, torch.float32)
        norm_S = torch.linalg.vector_norm(routing.y_SD, dim=-1, dtype=exact).double()
        weight_S = routing.weight_S.double()
        self._add("norm_sum", self._per_expert(routing.expert_S, norm_S))
        self._add("gate_norm_sum", self._per_expert(routing.expert_S, weight_S * norm_S))
        if routing.leaving_TD is not None:
            leaving = routing.leaving_TD.to(exact)
            for name, state in (("block", routing.entering_TD), ("layer", routing.residual_TD)):
                cosine_T = F.cosine_similarity(state.to(exact), leaving, dim=-1)
                self._add(f"{name}_cosine_sum", cosine_T.sum(dtype=torch.float64)[None])
        if routing.shared_gate_T is not None:
            self._add("shared_gate_sum", routing.shared_gate_T.double().sum()[None])

    def add_routed(self, logits_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
        """Add what the router made of one batch: all that needs no more than this."""
        tokens = len(index_TK)
        if self.scoring is None and tokens:
            self.scoring = matching_scoring(logits_TE, index_TK, weight_TK)
        # Families differ in the order of the chosen experts: here the heaviest comes first.
        weight_TK, order_TK = weight_TK.double().sort(dim=1, descending=True, stable=True)
        index_TK = index_TK.gather(1, order_TK)
        ranks = [self._per_expert(index_T) for index_T in index_TK.unbind(1)]
        logits_TE = logits_TE.double()
        self._add("tokens", torch.tensor([float(tokens)], dtype=torch.float64))
        self._add("count", torch.stack(ranks).sum(dim=0))
        self._add("gate_sum", self._per_expert(index_TK.flatten(), weight_TK.flatten()))
        self._add("logit_product_sum", logits_TE.T @ logits_TE)
        self._add("rank_count", torch.stack(ranks))
        share_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
        self._add("rank_share_sum", share_TK.sum(dim=0))
        if self.scoring is not None:
            probability_TE = SCORINGS[self.scoring](logits_TE)
            share_TE = probability_TE / probability_TE.sum(dim=1, keepdim=True)
            self._add("probability_sum", probability_TE.sum(dim=0))
            self._add("entropy_sum", torch.special.entr(share_TE).sum()[None])

    def _per_expert(self, expert_S: Tensor, values_S: Tensor | None = None) -> Tensor:
        return torch.bincount(expert_S, values_S, minlength=self.info.num_experts).double()

    def _add(self, name: str, value: Tensor) -> None:
        value = value.cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            reason = (
                "its router's weights follow none of the known scorings "
                f"({', '.join(SCORINGS)}), so it has no full probability"
                if name in OF_PROBABILITY
                else f"it has {sorted(self.sums)}"
            )
            raise UserError(f"layer {self.info.index} has no statistic {name!r}: {reason}")
        return self.sums[name]

    def mean_cosine(self, name: str) -> float:
        """Mean over tokens of the `name` ("block" or "layer") cosine."""
        return float(self[f"{name}_cosine_sum"] / self["tokens"])

    def logit_cosine(self) -> Tensor:
        """Cosine [E, E] of the experts' router logits over all tokens; 0 for logits always 0."""
        product = self["logit_product_sum"]
        norm = product.diagonal().sqrt()
        scale = norm[:, None] * norm[None, :]
        return torch.where(scale > 0, product / scale, torch.zeros_like(product))

    def mean(self, name: str) -> Tensor:
        """A sum over routed tokens divided by their count; 0 for experts that saw no token."""
        count = self["count"]
        return torch.where(count > 0, self[name] / count.clamp(min=1), torch.zeros_like(count))


def router_norm(layer: MoELayer) -> Tensor:
    """l2 norm [E] of each expert's row of the router's weight."""
    num_experts = layer.info.num_experts
    for weight in layer.router.parameters():
        if weight.dim() == 2 and num_experts in weight.shape:
            rows_ED = weight.detach().movedim(weight.shape.index(num_experts), 0)
            return torch.linalg.vector_norm(rows_ED.double(), dim=1).cpu()
    raise UserError(f"{type(layer.router).__name__} has no weight with a row for each expert")


class Collection:
    """The statistics that an open pass collects, split by group."""

    def __init__(self, layers: Iterable[MoELayer], observation: Observation | RoutersObservation):
        self.layers = {layer.info.index: layer for layer in layers}
        self.observation = observation
        self.group = 0
        self.found: dict[tuple[int, int], LayerStatistics] = {}

    @contextmanager
    def batch(self, valid: Tensor, group: int = 0) -> Iterator[None]:
        """Around the computation of one batch of one group; valid: [B, L] bool."""
        self.observation.valid, self.group = valid, group
        with suppress(AllRouted):
            yield

    def of(self, index: int) -> LayerStatistics:
        """What the current group's statistics of a layer, whose weights are in memory, add to."""
        key = self.group, index
        if key not in self.found:
            layer = self.layers[index]
            sums = {"router_norm": router_norm(layer)}
            self.found[key] = LayerStatistics(layer.info, sums, scoring(layer))
        return self.found[key]

    def of_group(self, group: int = 0) -> list[LayerStatistics]:
        """The statistics of one group, by layer."""
        return [self.found[key] for key in sorted(self.found) if key[0] == group]


@contextmanager
def collecting(model: torch.nn.Module, only_routers: bool = False) -> Iterator[Collection]:
    """Collect while it is open: all statistics, or those of the routers alone.

    With `only_routers` a batch ends at the last MoE layer's router.
    """

    def add(info: LayerInfo, routing: Routing) -> None:
        collection.of(info.index).add(routing)

    def add_routed(layer: MoELayer, *routed: Tensor) -> None:
        collection.of(layer.info.index).add_routed(*routed)

    opened = observe_routers(model, add_routed) if only_routers else observe(model, add)
    with torch.inference_mode(), opened as observation:
        collection = Collection(moe_layers(model), observation)
        yield collection


def collect(
    model: torch.nn.Module, batches: Iterable[dict[str, Tensor]], only_routers: bool = False
) -> list[LayerStatistics]:
    """The statistics of a model in one pass over `batches` (input_ids, attention_mask [B, L])."""
    return collect_by_group(model, ((0, batch) for batch in batches), only_routers).of_group()


def collect_by_group(
    model: torch.nn.Module,
    batches: Iterable[tuple[int, dict[str, Tensor]]],
    only_routers: bool = False,
) -> Collection:
    """The same split by the number of the group that stands before each batch."""
    with collecting(model, only_routers) as collection:
        for group, batch in batches:
            with collection.batch(batch["attention_mask"].bool(), group):
                # Only the last position's logits: nobody reads them, and they would dominate.
                model(**batch, use_cache=False, logits_to_keep=1)
    return collection


def added(parts: Iterable[Sequence[LayerStatistics]]) -> list[LayerStatistics]:
    """The statistics of several passes over parts of the data as those of one over all of it."""
    of_layer: dict[int, list[LayerStatistics]] = {}
    for layer in (layer for part in parts for layer in part if layer["tokens"] > 0):
        of_layer.setdefault(layer.info.index, []).append(layer)
    return [_added(of_layer[index]) for index in sorted(of_layer)]


def _added(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    first = parts[0]
    names = [name for name in first.sums if all(name in part.sums for part in parts)]
    sums = {name: sum(part[name] for part in parts) for name in names if name not in CONSTANTS}
    return LayerStatistics(first.info, sums | {name: first[name] for name in CONSTANTS})


def reduce(layers: Sequence[LayerStatistics]) -> list[LayerStatistics]:
    """What all processes collected, each from its part of the data, added up; the same in each.

    Every process has to call it; a process alone gets its own.
    """
    return added(gather_object([list(layers)]))


def save(layers: Iterable[LayerStatistics], folder: Path) -> None:
    """One safetensors file a layer, and `layers.json` that names them."""
    infos = []
    for layer in layers:
        sums = {name: value.contiguous() for name, value in layer.sums.items()}
        save_file(sums, folder / f"layer_{layer.info.index:03d}.safetensors")
        infos.append(asdict(layer.info))
    (folder / "layers.json").write_text(json.dumps(infos, indent=1) + "\n")


def load(folder: Path) -> list[LayerStatistics]:
    """Read what `save` wrote."""
    infos = [LayerInfo(**values) for values in json.loads((folder / "layers.json").read_text())]
    return [
        LayerStatistics(info, load_file(folder / f"layer_{info.index:03d}.safetensors"))
        for info in infos
    ]


def save_groups(groups: Mapping[str, Iterable[LayerStatistics]], folder: Path) -> None:
    """The statistics of each group in groups/<number>/, and `groups.json`, their names in order."""
    for number, layers in enumerate(groups.values()):
        (folder / "groups" / str(number)).mkdir(parents=True, exist_ok=True)
        save(layers, folder / "groups" / str(number))
    (folder / GROUPS).write_text(json.dumps(list(groups)) + "\n")


def load_groups(folder: Path) -> dict[str, list[LayerStatistics]]:
    """Read what `save_groups` wrote; empty where there are no groups."""
    if not (folder / GROUPS).is_file():
        return {}
    names = json.loads((folder / GROUPS).read_text())
    return {name: load(folder / "groups" / str(number)) for number, name in enumerate(names)}
