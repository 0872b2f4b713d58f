"""Observing the MoE layers of a model: every routing of every batch, without changing a logit.

The router's own weights and indices are taken, never recomputed: families differ in scoring,
renormalisation, groups and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.experts import (
    Experts,
    expert_hidden,
    expert_output,
    expert_parameters,
    rows_of_each,
    scales_input,
)
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, Output, further_rows, hidden_of, moe_layers
from moe_lab.models.remapped import RemappedExperts
from moe_lab.models.skipping import is_skipping
from moe_lab.types import LayerInfo, Routing, UserError

OBSERVING = "moe_lab_observing"
# Numbers that products on a CPU give at a time: blocks of 16 MB and less are used again, larger
# ones are given back to the system, which clears each page before it hands it out again.
REUSABLE_NUMBERS = 2**22


class ValidTokens:
    """Which tokens of a batch are data: `valid`, [B, L] bool, is set before each forward pass.

    rows: where they are in the flattened batch, None where all of them are. It is found once, when
    `valid` is set: on a GPU whoever asks how many rows there are waits for all work before.
    """

    rows: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """True where a token is data; None: everywhere."""
        return self._valid

    @valid.setter
    def valid(self, valid_BL: Tensor | None) -> None:
        self._valid, self.rows = valid_BL, None
        if valid_BL is not None:
            rows = valid_BL.flatten().nonzero()[:, 0]
            self.rows = rows if len(rows) < valid_BL.numel() else None

    _valid: Tensor | None = None


class Observation(ValidTokens):
    """The open observation of one model: set `valid` before each forward pass.

    No padding enters any statistic.
    """

    def __init__(
        self,
        observer: Callable[[LayerInfo, Routing], None],
        implementation: str,
        neurons: bool = False,
    ):
        self.observer = observer
        self.neurons = neurons
        self.hidden: dict[nn.Module, Tensor] = {}
        self.shared_hidden: dict[nn.Module, Tensor] = {}
        self.implementation = implementation
        self.layer_of: dict[nn.Module, MoELayer] = {}
        self.logits: dict[nn.Module, Tensor] = {}
        self.shared_gate: dict[nn.Module, Tensor] = {}
        self.inputs: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.entering: dict[nn.Module, Tensor] = {}
        self.norms: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.residual: dict[nn.Module, Tensor | None] = {}
        self.added: dict[nn.Module, Tensor] = {}


_open: dict[nn.Module, Observation] = {}
RoutersObserver = Callable[[MoELayer, Tensor, Tensor, Tensor], None]
Hook = Callable[..., None]
Arguments = tuple[Any, ...]  # of a module, as torch hands them to its hooks
Named = dict[str, Any]


class AllRouted(Exception):
    """Ends a forward pass at the last MoE layer's router: nothing behind it was asked for."""


class RoutersObservation(ValidTokens):
    """The open observation of a model's routers alone: set `valid` as of an Observation."""


@contextmanager
def observe_routers(
    model: PreTrainedModel, observer: RoutersObserver, whole: bool = False
) -> Iterator[RoutersObservation]:
    """Call `observer(layer, logits_TE, index_TK, weight_TK)` at every router, valid tokens only.

    Unless the `whole` forward pass is asked for, the last MoE layer's router ends it with
    `AllRouted`, which the caller expects: its experts, the layers behind it and the head are never
    computed. Raises UserError where a router does not return (logits, weights, indices).
    """
    layers = moe_layers(model)
    observation = RoutersObservation()

    def hook_of(layer: MoELayer) -> Hook:
        leaves_out = _leaves_out(layer)  # looked at once: a hook runs at every token

        def hook(module: nn.Module, args: Arguments, output: Any) -> None:
            logits = _of_experts(_router_logits(output), layer)
            weight, index = (part.reshape(len(logits), -1) for part in output[1:3])
            index = without_none(layer, index, weight) if leaves_out else index
            routed: tuple[Tensor, ...] = logits, index, weight
            if observation.rows is not None:
                rows = observation.rows.to(logits.device)
                routed = tuple(part[rows] for part in routed)
            observer(layer, *routed)
            if layer is layers[-1] and not whole:
                raise AllRouted

        return hook

    handles = [layer.router.register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield observation
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def observe(
    model: PreTrainedModel, observer: Callable[[LayerInfo, Routing], None], neurons: bool = False
) -> Iterator[Observation]:
    """Call `observer` with the routing of every batch at every MoE layer, without changing logits.

    neurons: also with what the hidden units of the experts compute. Raises UserError where a router
    does not return (logits, weights, indices).
    """
    layers = moe_layers(model)
    handles = []
    previous = model.config._experts_implementation
    observation = Observation(observer, previous, neurons)
    model.set_experts_implementation(OBSERVING)
    try:
        for layer in layers:
            observation.layer_of[layer.experts] = layer
            _open[layer.experts] = observation
            handles += _hooks(observation, layer)
        yield observation
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            _open.pop(layer.experts, None)
        model.set_experts_implementation(previous)
        vars(observation).clear()  # it is in a cycle with its observer, which may hold the model


def _hooks(observation: Observation, layer: MoELayer) -> list[RemovableHandle]:
    """All hooks of one layer; its routing is emitted when its decoder layer ends."""
    key = layer.experts
    keep = _keeper(observation.logits, key, _router_logits)
    handles = [layer.router.register_forward_hook(keep)]
    if layer.shared_gate is not None:
        keep = _keeper(observation.shared_gate, key, lambda gate: gate)
        handles.append(layer.shared_gate.register_forward_hook(keep))

    down = getattr(layer.shared, "down_proj", None) if observation.neurons else None
    if down is not None:

        def shared(module: nn.Module, args: Arguments) -> None:
            observation.shared_hidden[key] = args[0]

        handles.append(down.register_forward_pre_hook(shared))

    def enter(module: nn.Module, args: Arguments, kwargs: Named) -> None:
        observation.entering[key] = _input(args, kwargs)
        observation.norms[key] = []

    def normed(module: nn.Module, args: Arguments, kwargs: Named, output: Tensor) -> None:
        if key in observation.norms:  # else it stands behind the block
            observation.norms[key].append((_input(args, kwargs), output))

    def added(module: nn.Module, args: Arguments, kwargs: Named, output: Output) -> None:
        # The norm whose very output the block got: what went into it is the residual stream.
        inputs = [x for x, out in observation.norms.pop(key) if out is _input(args, kwargs)]
        observation.residual[key] = inputs[-1] if inputs else None
        observation.added[key] = hidden_of(output)

    handles.append(layer.decoder.register_forward_pre_hook(enter, with_kwargs=True))
    if layer.has_block:
        for name, child in layer.decoder.named_children():
            if "norm" in name:
                handles.append(child.register_forward_hook(normed, with_kwargs=True))
        handles.append(layer.block.register_forward_hook(added, with_kwargs=True))
    handles.append(layer.decoder.register_forward_hook(_emitter(observation, layer)))
    return handles


def _input(args: Arguments, kwargs: Named) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _router_logits(output: object) -> Tensor:
    if not isinstance(output, tuple) or len(output) < 3:
        raise UserError("this family's router does not return (logits, weights, indices)")
    logits: Tensor = output[0]
    return logits


def _keeper(store: dict[nn.Module, Tensor], key: nn.Module, pick: Callable[[Any], Tensor]) -> Hook:
    def hook(module: nn.Module, args: Arguments, output: object) -> None:
        store[key] = pick(output)

    return hook


def _emitter(observation: Observation, layer: MoELayer) -> Hook:
    def hook(module: nn.Module, args: Arguments, output: Output) -> None:
        key = layer.experts
        if key not in observation.inputs:
            raise UserError(
                f"{type(key).__name__} does not compute as transformers' experts modules do (its "
                "forward pass is its own): what its experts give cannot be observed"
            )
        *routed, out = observation.inputs.pop(key)
        logits = _of_experts(observation.logits.pop(key), layer)
        gate = observation.shared_gate.pop(key, None)
        gate = None if gate is None else gate.reshape(-1).sigmoid()
        around = _around(observation, layer, hidden_of(output), out)
        hidden = observation.shared_hidden.pop(key, None)
        routing = _routing(_chosen(layer, routed), logits, gate, observation.rows, around, hidden)
        observation.observer(layer.info, routing)

    return hook


def _of_experts(logits: Tensor, layer: MoELayer) -> Tensor:
    """The logits of what a token can be sent to; what other rows of the router are of goes."""
    return logits.reshape(-1, logits.shape[-1])[:, : layer.info.num_rows]


def _leaves_out(layer: MoELayer) -> bool:
    """Whether what has the weight 0 is no choice: of routers with further rows, or with a rule."""
    return bool(further_rows(layer)) or is_skipping(layer)


def without_none(layer: MoELayer, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The choices, E where a router with further rows chose none (zaya: expert 0, weight 0), or
    where a rule left the expert out."""
    if not _leaves_out(layer):
        return index_TK
    return index_TK.masked_fill(weight_TK == 0, layer.info.num_experts)


def _chosen(layer: MoELayer, routed: list[Tensor]) -> list[Tensor]:
    """What was routed, without the pairs in which a token has no expert."""
    if not further_rows(layer):
        return routed
    x, index, weight, *pairs = routed
    there = (pairs[3] != 0).nonzero()[:, 0]  # their weights
    return [x, without_none(layer, index, weight), weight, *(part[there] for part in pairs)]


def _around(
    observation: Observation, layer: MoELayer, leaving: Tensor, routed: Tensor
) -> tuple[Tensor | None, ...]:
    """What enters, the residual, what leaves, what the routed experts add, [T, D] each.

    None for what has no meaning: the states around a block where each token has several streams
    of them, or where the block is the decoder layer; the sum of experts that are latent.
    """
    key, size = layer.experts, layer.info.hidden_size
    entering = observation.entering.pop(key)
    residual, added = observation.residual.pop(key, None), observation.added.pop(key, None)
    observation.norms.pop(key, None)
    if not (entering.shape == leaving.shape and entering.numel() == routed.shape[0] * size):
        return None, None, None, None
    if residual is None and added is not None:  # no norm before it: what it added is taken off
        residual = leaving.double() - added.reshape(leaving.shape).double()
    states = entering, residual, leaving, routed if routed.shape[-1] == size else None
    return tuple(None if one is None else one.reshape(-1, one.shape[-1]) for one in states)


def _routing(
    routed: list[Tensor],
    logits: Tensor,
    gate: Tensor | None,
    rows: Tensor | None,
    around: tuple[Tensor | None, ...],
    shared: Tensor | None,
) -> Routing:
    """Of the tokens in these rows alone; None: of all."""
    x, index, weight, y, expert, token, weight_s, *hidden = routed
    shared = None if shared is None else shared.reshape(-1, shared.shape[-1])
    h = hidden[0] if hidden else None
    if rows is None:
        found = Routing(x, logits, index, weight, y, expert, token, weight_s, gate, *around)
        return replace(found, hidden_SI=h, shared_hidden_TI=shared)
    rows = rows.to(x.device)
    row = token.new_full((len(x),), -1)  # a valid token's row after padding is gone
    row[rows] = torch.arange(len(rows), device=rows.device)
    row_s = row[token]
    if len(token) == index.numel():  # as many as the valid tokens have: nobody has to count them
        pairs = torch.nonzero_static(row_s >= 0, size=len(rows) * index.shape[1])[:, 0]
    else:
        pairs = (row_s >= 0).nonzero()[:, 0]
    gate = None if gate is None else gate[rows]
    found = Routing(
        x[rows], logits[rows], index[rows], weight[rows],
        y[pairs], expert[pairs], row_s[pairs], weight_s[pairs], gate,
        *(None if state is None else state[rows] for state in around),
    )  # fmt: skip
    h, shared = None if h is None else h[pairs], None if shared is None else shared[rows]
    return replace(found, hidden_SI=h, shared_hidden_TI=shared)


def _observing_experts(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts, over the token-expert pairs sorted by expert.

    Products are those of the implementation that was set before, and sums have its order: on CPU
    the logits are equal to the bit.
    """
    observation = _open.get(self)
    neurons = observation is not None and observation.neurons
    num_tokens = len(top_k_index)
    expert_S, order_S = top_k_index.t().reshape(-1).sort(stable=True)
    count_E = rows_of_each(expert_S, self.num_experts)
    grouped = _is_grouped(self, observation)
    counts = None if grouped else count_E.tolist()
    if self._is_expert_parallel or counts is not None:  # else there is no index of nobody
        number = int(count_E.sum()) if counts is None else sum(counts)
        expert_S, order_S = expert_S[:number], order_S[:number]
    token_S, rank_S = order_S % num_tokens, order_S // num_tokens
    weight_S = top_k_weights[token_S, rank_S]
    scale_S = weight_S if scales_input(self) else None
    if scale_S is not None:  # it is inside the outputs
        weight_S = torch.ones_like(weight_S)

    def entering(rows: slice) -> Tensor:
        x_ND = hidden_states.index_select(0, token_S[rows])
        return x_ND if scale_S is None else x_ND * scale_S[rows, None]

    if counts is None:
        y_SD, h_SI = _grouped_outputs(self, entering, expert_S, count_E, neurons)
    else:
        y_SD, h_SI = _outputs_of_each(self, entering(slice(None)), counts, neurons)
    if observation is not None and observation.implementation == "eager":
        out = torch.zeros_like(hidden_states)
        out.index_add_(0, token_S, (y_SD * weight_S[:, None]).to(out.dtype))
    else:
        out = _added_up(y_SD, weight_S, order_S, top_k_index).to(hidden_states.dtype)
    if observation is not None:
        pairs: tuple[Tensor, ...] = y_SD, expert_S, token_S, weight_S
        pairs += (h_SI,) if neurons else ()
        routed: tuple[Tensor, ...] = hidden_states, top_k_index, top_k_weights, *pairs, out
        if isinstance(self, RemappedExperts) and self.routed_to is not None:
            routed = _by_row(self, self.routed_to, routed, order_S)
        observation.inputs[self] = routed
    return out


def _is_grouped(experts: Experts, observation: Observation | None) -> bool:
    """Whether they were computed by grouped products before: one for all experts, not one each."""
    before = None if observation is None else observation.implementation
    return before == "grouped_mm" and not isinstance(experts, AdaptedExperts)


def _grouped_outputs(
    experts: Experts,
    entering: Callable[[slice], Tensor],
    expert_S: Tensor,
    count_E: Tensor,
    neurons: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [S, D] by transformers' own grouped products; hidden units [S, I] for `neurons`.

    entering(rows): what enters the experts in these rows.
    """
    parts = list(_at_a_time(experts, expert_S, count_E))
    y_SD = h_SI = None
    for some, rows in parts:
        y_ND, h_NI = _grouped_part(experts, entering(rows), some, expert_S[rows], count_E[some])
        h_NI = h_NI if neurons else h_NI[:0]
        if len(parts) == 1:
            return y_ND, h_NI
        if y_SD is None or h_SI is None:
            y_SD = y_ND.new_empty(len(expert_S), y_ND.shape[1])
            h_SI = h_NI.new_empty(len(expert_S) if neurons else 0, h_NI.shape[1])
        y_SD[rows] = y_ND
        h_SI[rows] = h_NI
    assert y_SD is not None and h_SI is not None
    return y_SD, h_SI


def _at_a_time(
    experts: Experts, expert_S: Tensor, count_E: Tensor
) -> Iterator[tuple[slice, slice]]:
    """Experts that are computed together, and the rows of their pairs."""
    widest = max(max(p.shape[1:]) for p in experts.parameters(recurse=False) if p.dim() > 2)
    fit = len(expert_S) * widest <= REUSABLE_NUMBERS
    if fit or not _is_cut(count_E):
        yield slice(None), slice(None)
        return
    first = begin = rows = 0
    for expert, count in enumerate(count_E.tolist()):
        if rows and rows + count > REUSABLE_NUMBERS // widest:
            yield slice(first, expert), slice(begin, begin + rows)
            first, begin, rows = expert, begin + rows, 0
        rows += count
    yield slice(first, None), slice(begin, None)


def _is_cut(one: Tensor) -> bool:
    """Whether work is done in blocks: not on a GPU, which would have to be waited for to know
    where they end, nor where gradients are wanted."""
    return one.device.type == "cpu" and not torch.is_grad_enabled()


def _grouped_part(
    experts: Experts, x_ND: Tensor, some: slice, expert_N: Tensor, count_E: Tensor
) -> tuple[Tensor, Tensor]:
    """What these experts give, and their hidden units, for the rows that go to them."""
    ends_E = count_E.cumsum(0, dtype=torch.int32)

    def product(x: Tensor, name: str) -> Tensor:
        bias = getattr(experts, f"{name}_bias")[expert_N] if experts.has_bias else None
        weight = getattr(experts, name)[some]
        return _grouped_linear(x, weight, ends_E, bias=bias, is_transposed=experts.is_transposed)

    if experts.has_gate:
        h_NI = experts._apply_gate(product(x_ND, "gate_up_proj"))
    else:
        h_NI = experts.act_fn(product(x_ND, "up_proj"))
    y_ND = product(h_NI, "down_proj")
    return experts.post_expert_norm(y_ND) if experts.has_post_expert_norm else y_ND, h_NI


def _outputs_of_each(
    experts: Experts, x_SD: Tensor, counts: list[int], neurons: bool
) -> tuple[Tensor, Tensor]:
    """The same by products of each expert, of which so many rows are, one after the other.

    Without `neurons` there are no hidden units [0, I]. `unbind` keeps the backward pass linear in
    the number of experts.
    """
    outputs, hidden = [], [x_SD.new_empty(0, HiddenUnits(experts).width)]
    for parameters, x in zip(expert_parameters(experts), x_SD.split(counts), strict=True):
        if len(x):
            h = expert_hidden(experts, parameters, x)
            outputs.append(expert_output(experts, parameters, h))
            hidden += [h] if neurons else []
    return torch.cat(outputs or [x_SD]), torch.cat(hidden)


def _added_up(y_SD: Tensor, weight_S: Tensor, order_S: Tensor, index_TK: Tensor) -> Tensor:
    """The sum [T, D] of each token's weighted pairs, which stand at order_S = rank * T + token."""
    num_tokens, num_chosen = index_TK.shape
    if len(order_S) != index_TK.numel():
        weighted_SD = y_SD * weight_S[:, None]
        slots = weighted_SD.new_zeros(index_TK.numel(), weighted_SD.shape[1])
        slots[order_S % num_tokens * num_chosen + order_S // num_tokens] = weighted_SD
        return slots.view(num_tokens, num_chosen, -1).sum(dim=1)
    place_KT = torch.empty_like(order_S)
    place_KT[order_S] = torch.arange(len(order_S), device=order_S.device)
    place_TK = place_KT.view(num_chosen, num_tokens).t()
    at_once = num_tokens
    if _is_cut(y_SD):
        at_once = max(1, REUSABLE_NUMBERS // (num_chosen * y_SD.shape[1]))
    sums = []
    for place_NK in place_TK.split(at_once):
        place_P = place_NK.reshape(-1)
        # Not by plain indexing, which takes three times as long for the same.
        weighted_PD = y_SD.index_select(0, place_P) * weight_S.index_select(0, place_P)[:, None]
        sums.append(weighted_PD.view(*place_NK.shape, -1).sum(dim=1))
    return torch.cat(sums)


def _by_row(
    experts: RemappedExperts, row_TK: Tensor, routed: tuple[Tensor, ...], order_S: Tensor
) -> tuple[Tensor, ...]:
    """What is observed of experts that several router rows lead to, or none: all of it by row.

    Each row counts as an expert of its own; the pairs that went to stand-ins join the others.
    """
    x_TD, _, weight_TK, y_SD, _, token_S, _, *_, out_TD = routed
    num_tokens, num_chosen = row_TK.shape
    place_TK = experts.place_E[row_TK]
    y_TKD = y_SD.new_empty(num_tokens, num_chosen, y_SD.shape[1])
    y_TKD[token_S, order_S // num_tokens] = y_SD
    token_G, rank_G = torch.where(place_TK >= experts.num_experts)
    y_TKD[token_G, rank_G] = experts.stand_in_outputs(x_TD[token_G], place_TK[token_G, rank_G])
    row_S, order_S = row_TK.t().reshape(-1).sort(stable=True)
    token_S, rank_S = order_S % num_tokens, order_S // num_tokens
    out_TD = experts.with_stand_ins(out_TD, x_TD, place_TK, weight_TK)
    pairs = y_TKD[token_S, rank_S], row_S, token_S, weight_TK[token_S, rank_S]
    return x_TD, row_TK, weight_TK, *pairs, out_TD


ALL_EXPERTS_FUNCTIONS.register(OBSERVING, _observing_experts)
