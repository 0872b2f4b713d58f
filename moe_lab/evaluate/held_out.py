"""A model on held-out text: how far its predictions are from another's, and what its routers do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lab import processes
from moe_lab.evaluate.dense_predictions import DensePredictions, predicting
from moe_lab.evaluate.experts_used import ExpertsUsed, used_by_layer, used_figures
from moe_lab.finite import number_word
from moe_lab.models.checkpoint import Model
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.observing import observe_routers
from moe_lab.models.predictions import divergence_and_loss, logits_at
from moe_lab.models.remapped import RemappedExperts, stand_in_rows
from moe_lab.models.routers import scoring
from moe_lab.profile.collect import added
from moe_lab.profile.layer import LayerStatistics
from moe_lab.progress import progress
from moe_lab.types import NotFinite


@dataclass(frozen=True)
class HeldOut:
    """What the pass found.

    figures, flat: kl, KL(dense || model) of the next-token distributions in nats, and
    held_out/perplexity; both are means over the valid positions that have a next token
    (perplexity: its exponential). Where there are MoE layers, means over them and all valid tokens:
    routing/entropy, in nats, of the router's full distribution (a sigmoid's scores are divided by
    their sum first; left out where a layer's weights follow no known scoring); routing/top_k, how
    many experts a token got that no rule left out; routing/stand_ins, how many of these only stood
    in for removed ones (where any do); routing/weight_<k>, the share that a token's k-th heaviest
    expert has of its routed weight. Of the experts that are computed (`experts_used.py`):
    routing/active_parameters and routing/expert_flops, of a token as it was routed;
    routing/distinct_experts_<batch>, how many different ones so many tokens need.
    routed: "layers", their true indices, and "rank_count" [layer][k - 1][expert], the tokens whose
    k-th heaviest expert each was; "experts_per_token" and "distinct_experts_<batch>", [layer].
    """

    figures: dict[str, float]
    routed: dict[str, Any]


@torch.inference_mode()
def compare_held_out(
    model: Model,
    batches: Sequence[dict[str, Tensor]],
    dense: DensePredictions | None = None,
    documents: Sequence[int] | None = None,
) -> HeldOut:
    """A model on `batches` (input_ids, attention_mask [B, L]), and beside what the dense one says.

    dense: its predictions on the same batches, None where the model is the dense one. documents:
    the numbers of the batches' rows, which a NotFinite names; None: they are in order.
    Several processes take every so-manieth batch each, and find the same.
    """
    divergence, loss, count = 0.0, 0.0, 0
    sizes = (len(batch["input_ids"]) for batch in batches)
    first_rows = list(itertools.accumulate(sizes, initial=0))
    routing = _Routing(model)
    mine = processes.share(range(len(batches)))
    for number in progress(mine, "evaluate: held-out text"):
        batch = batches[number]
        valid, predicts = batch["attention_mask"].bool(), predicting(batch)
        positions = predicts.flatten().nonzero()[:, 0]
        targets = batch["input_ids"].roll(-1, dims=1).flatten()[positions]
        with observe_routers(model, routing.add, whole=True) as observation:
            observation.valid = valid
            q = logits_at(model, predicts, **batch, use_cache=False)
        p, head = dense.logits(number, batch) if dense else (None, None)
        terms, losses = divergence_and_loss(p, head, q, targets)
        del p, q  # before the next batch's
        more = torch.stack([terms.sum(), losses.sum()]).tolist()
        divergence, loss = divergence + more[0], loss + more[1]
        if not math.isfinite(divergence + loss):
            row = first_rows[number] + _first_row(positions // valid.shape[1], terms)
            place = row if documents is None else documents[row]
            raise NotFinite(
                f"the predictions for document {place} of the held-out text are not finite: loss "
                f"{number_word(loss)}, divergence from dense {number_word(divergence)}"
            )
        count += len(positions)
    parts = processes.gather((divergence, loss, count))
    divergence, loss, count = (sum(values) for values in zip(*parts, strict=True))
    told = routing.told()
    figures = {"held_out/perplexity": perplexity(loss / count), "kl": divergence / count}
    return HeldOut(figures | told.figures, told.routed)


class _Routing:
    """What a model's routers do on the text, layer by layer."""

    def __init__(self, model: Model):
        self.model, layers = model, moe_layers(model)
        self.routers = {
            layer.info.index: LayerStatistics(layer.info, scoring=scoring(layer))
            for layer in layers
        }
        self.used = {layer.info.index: ExpertsUsed(layer) for layer in layers}

    def add(self, layer: MoELayer, *routed: Tensor) -> None:
        """What `observe_routers` tells of a batch."""
        self.routers[layer.info.index].add_routed(*routed)
        self.used[layer.info.index].add(routed[1])

    def told(self) -> HeldOut:
        """Its part of what the pass found, in all processes together."""
        heard = [one for one in self.routers.values() if one.sums]  # none where there was no batch
        routers = {one.info.index: one for one in added(processes.gather(heard))}
        seen = [one.gathered() for one in self.used.values()]
        figures = _routing_figures(list(routers.values()))
        figures |= _stand_ins(moe_layers(self.model), routers) | used_figures(self.model, seen)
        routed = {
            "layers": list(routers),
            "rank_count": [router["rank_count"].int().tolist() for router in routers.values()],
        }
        return HeldOut(figures, routed | used_by_layer(seen))


def perplexity(loss: float) -> float:
    """exp(loss); NotFinite where no float holds it."""
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise NotFinite(
            f"the held-out text's loss is {loss:.4g} nats per token, so that its perplexity is "
            "more than a number can be: the model is broken"
        ) from error


def _first_row(row_N: Tensor, divergence_N: Tensor) -> int:
    """The first sequence of a batch whose predictions, in the rows [N], are none."""
    bad_N = divergence_N.isfinite().logical_not()
    return int(row_N[bad_N].min()) if bool(bad_N.any()) else 0


def _routing_figures(routers: Sequence[LayerStatistics]) -> dict[str, float]:
    """The means of HeldOut's routing/..., each layer counting the same."""
    figures: dict[str, float] = {}
    if routers and all("entropy_sum" in router.sums for router in routers):
        entropies = [router["entropy_sum"].item() / router["tokens"].item() for router in routers]
        figures["routing/entropy"] = _mean(entropies)
    if routers:
        shares = [(router["rank_share_sum"] / router["tokens"]).tolist() for router in routers]
        figures["routing/top_k"] = _mean([_experts_per_token(router) for router in routers])
        for rank in range(max(len(share_K) for share_K in shares)):
            share = [share_K[rank] if rank < len(share_K) else 0.0 for share_K in shares]
            figures[f"routing/weight_{rank + 1}"] = _mean(share)
    return figures


def _experts_per_token(router: LayerStatistics) -> float:
    """How many a token was sent to, zero experts and stand-ins counted."""
    numbers = [router["count"].sum().item()]
    if router.info.zero_experts:
        numbers.append(router["zero_count"].item())
    return sum(numbers) / router["tokens"].item()


def _stand_ins(
    layers: Sequence[MoELayer], routers: Mapping[int, LayerStatistics]
) -> dict[str, float]:
    if not any(
        isinstance(layer.experts, RemappedExperts) and layer.experts.stand_in for layer in layers
    ):
        return {}
    numbers = []
    for layer in layers:
        router, stand_in_E = routers[layer.info.index], stand_in_rows(layer.experts)
        numbers.append((router["count"][stand_in_E].sum() / router["tokens"]).item())
    return {"routing/stand_ins": _mean(numbers)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
