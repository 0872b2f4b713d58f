"""Recording what routers do in every forward pass, without changing a logit.

While the model runs, only references to what its routers got and gave are kept. All else is
computed once a request is over, for all of its tokens together: the order of the experts, their
gates, and what the routers of the layers behind would have chosen from the same input. So a trace
costs next to nothing beside generating. Letters: see `types.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_lab.models.checkpoint import Model
from moe_lab.models.hashed import is_hashed
from moe_lab.models.layers import MoELayer, by_expert, moe_layers, num_rows_each
from moe_lab.models.observing import observe_routers, without_none
from moe_lab.models.probing import route
from moe_lab.models.remapped import RemappedExperts
from moe_lab.models.routers import SCORINGS, scoring
from moe_lab.trace.header import TracedLayer
from moe_lab.types import UserError

NO_EXPERT = -1  # in an expert's place: a stand-in or a zero expert, which has no weights


@dataclass
class LayerRecord:
    """What one MoE layer did with all tokens of some passes, pass behind pass.

    experts_TK: the experts that exist, the heaviest first, NO_EXPERT where a router's row leads to
    none; weight_TK: what the router hands on with each; score_TK: its probability before the
    chosen share it among them, None where the family's scoring is not known. ahead: the experts
    that the next layer, the next but one, … would have been sent these tokens to from this layer's
    input, each its own number of them; shorter where fewer layers follow or none can be asked.
    """

    experts_TK: Tensor
    weight_TK: Tensor
    score_TK: Tensor | None
    ahead: list[Tensor | None] = field(default_factory=list)


class Recorder:
    """The routers of one model, watched while `open`; `take` gives what they did since last time.

    lookahead: for how many MoE layers ahead experts are predicted (HOBBIT, 2411.01433: the next
    layers' gates on the current gate's input). Memory: the inputs of all routers until they are
    taken.
    """

    def __init__(self, model: Model, lookahead: int):
        self.model, self.lookahead = model, lookahead
        self.layers = moe_layers(model)
        self.scorings = [scoring(layer) for layer in self.layers]
        self.places = {layer.info.index: place for place, layer in enumerate(self.layers)}
        self.passes: list[int] = []
        self.watching = False
        self._inputs: list[list[Tensor]] = [[] for _ in self.layers]
        self._routed: list[list[tuple[Tensor, ...]]] = [[] for _ in self.layers]

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, every forward pass of the model is recorded."""
        handles = [
            layer.router.register_forward_pre_hook(self._keeper(place), with_kwargs=True)
            for place, layer in enumerate(self.layers)
        ]
        try:
            self.watching = True
            with observe_routers(self.model, self._routed_at, whole=True):
                yield
        finally:
            self.watching = False
            for handle in handles:
                handle.remove()

    def _keeper(self, place: int) -> Any:
        size = self.layers[place].info.hidden_size

        def keep(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            given = args[0] if args else next(iter(named.values()))
            if self.watching and given.is_floating_point() and given.shape[-1] == size:
                self._inputs[place].append(given.reshape(-1, size))

        return keep

    def _routed_at(self, layer: MoELayer, *routed: Tensor) -> None:
        place = self.places[layer.info.index]
        if place == 0:
            self.passes.append(len(routed[0]))
        self._routed[place].append(routed)

    @torch.no_grad()
    def take(self) -> tuple[list[int], list[LayerRecord]]:
        """The tokens of each pass since the last call, and what each layer did with them."""
        passes, self.passes = self.passes, []
        inputs = [torch.cat(parts) if parts else None for parts in self._inputs]
        watching, self.watching = self.watching, False  # predicting may call routers
        records = [self._record(place, inputs[place]) for place in range(len(self.layers))]
        self.watching = watching
        self._forget()
        if any(len(record.experts_TK) != sum(passes) for record in records):
            raise UserError(
                f"{type(self.model).__name__} runs its MoE layers on different numbers of tokens: "
                "it cannot be traced"
            )
        return passes, records

    def _forget(self) -> None:
        for inputs, routed in zip(self._inputs, self._routed, strict=True):
            inputs.clear()
            routed.clear()

    def _record(self, place: int, x_TD: Tensor | None) -> LayerRecord:
        logits_TE, index_TK, weight_TK = map(torch.cat, zip(*self._routed[place], strict=True))
        index_TK, weight_TK = heaviest_first(index_TK, weight_TK)
        layer, name, score_TK = self.layers[place], self.scorings[place], None
        if name is not None:
            score_TE = SCORINGS[name](logits_TE.float())
            score_TK = score_TE.gather(1, index_TK.clamp(max=score_TE.shape[1] - 1))
        targets = self.layers[place + 1 : place + 1 + self.lookahead]
        ahead = [None if x_TD is None else predicted_by(target, x_TD) for target in targets]
        return LayerRecord(experts_of(layer, index_TK), weight_TK.float(), score_TK, ahead)


def heaviest_first(index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token by falling weight, equal ones as the router gives them."""
    order_TK = weight_TK.float().argsort(dim=1, descending=True, stable=True)
    return index_TK.gather(1, order_TK), weight_TK.gather(1, order_TK)


def predicted_by(layer: MoELayer, x_TD: Tensor) -> Tensor | None:
    """The experts [T, K] that a layer's router would choose of another's input.

    None for routers that choose by token id, which need no prediction.
    """
    if is_hashed(layer):
        return None
    _, weight_TK, index_TK = route(layer, x_TD)
    index_TK = without_none(layer, index_TK, weight_TK)
    return experts_of(layer, heaviest_first(index_TK, weight_TK)[0])


def experts_of(layer: MoELayer, row_TK: Tensor) -> Tensor:
    """The experts that exist behind router rows; NO_EXPERT for all other rows."""
    number = layer.info.num_experts
    real_TK = row_TK.masked_fill(row_TK >= number, NO_EXPERT)
    if not isinstance(layer.experts, RemappedExperts):
        return real_TK
    place_TK = layer.experts.place_E[real_TK.clamp(min=0)]
    gone = (real_TK < 0) | (place_TK >= layer.experts.num_experts)
    return place_TK.masked_fill(gone, NO_EXPERT)


def traced_layer(layer: MoELayer) -> TracedLayer:
    """What a trace's header says of a layer."""
    info, router = layer.info, set(layer.router.modules())
    rows = [
        (tensor.narrow(dimension, 0, num_rows_each(layer, tensor, dimension)).numel(), tensor)
        for module, key, tensor, dimension in by_expert(layer)
        if module in router and key not in module._non_persistent_buffers_set
    ]
    parameters = sum(number for number, tensor in rows if isinstance(tensor, nn.Parameter))
    return TracedLayer(
        index=info.index,
        experts=info.real_experts or info.num_experts,
        top_k=info.top_k,
        shared=info.shared,
        parameters=info.expert_parameters - parameters,
        stored_bytes=info.expert_bytes - sum(n * tensor.element_size() for n, tensor in rows),
    )
