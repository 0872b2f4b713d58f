"""CD-MoE (2412.00069): which layers become dense, with which experts and which gates.

A condensed layer computes, for every token, w_s * shared(x) + sum_{i in S} w_i * E_i(x): no
router. Its constant gates w_i are the mean router weights of the calibration tokens that were
routed to i (conditional on selection). `experts/` holds the ways to choose S, `layers/` the ways
to choose the layers: one file each, with one function `choose`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_lab.moe import MoELayer, expert_forward, expert_parameters
from moe_lab.statistics import LayerStatistics
from moe_lab.stream import LayerStream, swapped
from moe_lab.types import UserError

EPSILON = 1e-10
TOKENS_AT_ONCE = 1024  # candidates are compared chunk by chunk, so that a chunk stays in the cache


def option(kind: str, name: str) -> Callable:
    """The function `choose` of condense.<kind>=<name>; UserError lists what exists."""
    package = importlib.import_module(f"moe_lab.condense.{kind}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    if name not in names:
        raise UserError(
            f"condense.{kind}={name!r} does not exist; there are {', '.join(names)}, or an "
            "explicit list of numbers"
        )
    return importlib.import_module(f"moe_lab.condense.{kind}.{name}").choose


def mean_gates(statistics: LayerStatistics) -> Tensor:
    """Constant gates [E]: mean router weight conditional on selection, 0 where never selected.

    CD-MoE (2412.00069): w_i = sum_{x: i in TopK(x)} g_i(x) / |{x: i in TopK(x)}|.
    """
    return statistics.mean("gate_sum")


def shared_gate(statistics: LayerStatistics) -> float:
    """The constant in place of a shared expert's sigmoid gate: its mean over all tokens, else 1."""
    if "shared_gate_sum" not in statistics.sums:
        return 1.0
    return float(statistics["shared_gate_sum"] / statistics["tokens"])


def js_divergence(reference_TD: Tensor, candidate_TD: Tensor) -> Tensor:
    """Jensen-Shannon divergence [T] of hidden states, softmaxed over the hidden dimension, in nats.

    CD-MoE (2412.00069, released code): JS(u, v) = KL(u||m)/2 + KL(v||m)/2, m = (u + v)/2, with
    1e-10 added to each of u, v and m. Computed as sum_d m (log(1-r^2) + 2 r atanh(r)) / 2 with
    r = (v-u)/(v+u), which is the same value without the cancellation of the textbook form.
    """
    return _js_of(_probability(reference_TD), candidate_TD)


def _js_of(u_TD: Tensor, candidate_TD: Tensor) -> Tensor:
    v = _probability(candidate_TD)
    total = u_TD + v
    edge = 1 - torch.finfo(total.dtype).eps / 2  # r rounds to 1 where u and v share no mass
    r = v.sub_(u_TD).div_(total).clamp_(-edge, edge)
    inner = torch.log1p(-r * r).add_(r.atanh().mul_(r), alpha=2)
    return inner.mul_(total).sum(dim=-1) / 4


def _probability(hidden: Tensor) -> Tensor:
    exact = hidden if hidden.dtype == torch.float64 else hidden.float()
    return exact.softmax(dim=-1).add_(EPSILON)


@dataclass
class OpenLayer:
    """One MoE layer of the intact model on the calibration tokens, opened for a search.

    target_TD: output of the decoder layer; base_TD: the same without any routed expert (attention,
    residual and the shared expert behind its constant gate); outputs_ETD: each expert's output for
    every token; gates_E; token_weight_T: each token's share in the mean over tokens of a document
    and then over documents. `finish` is the final norm for the last layer, else the identity.
    """

    layer: MoELayer
    target_TD: Tensor
    base_TD: Tensor
    outputs_ETD: Tensor
    gates_E: Tensor
    token_weight_T: Tensor
    finish: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self._target_parts = [_probability(part) for part in self.target_TD.split(TOKENS_AT_ONCE)]

    def divergences(self, hidden_TD: Tensor, experts: Sequence[int]) -> list[float]:
        """Mean JS divergence from the intact output if one of `experts` is added to `hidden_TD`."""
        sums = [0.0] * len(experts)
        hidden = hidden_TD.split(TOKENS_AT_ONCE)
        weights = self.token_weight_T.split(TOKENS_AT_ONCE)
        outputs = self.outputs_ETD.split(TOKENS_AT_ONCE, dim=1)
        for u, h, y, weight in zip(self._target_parts, hidden, outputs, weights, strict=True):
            for i, expert in enumerate(experts):
                js_T = _js_of(u, self.finish(h + self.gates_E[expert] * y[expert]))
                sums[i] += float(weight @ js_T.double())
        return sums

    def divergence(self, hidden_TD: Tensor) -> float:
        """Mean JS divergence from the intact layer's output to `hidden_TD`."""
        js_T = js_divergence(self.target_TD, self.finish(hidden_TD))
        return float(self.token_weight_T @ js_T.double())

    def add(self, hidden_TD: Tensor, expert: int) -> Tensor:
        """The output with one more routed expert behind its constant gate."""
        return hidden_TD + self.gates_E[expert] * self.outputs_ETD[expert]


@dataclass(frozen=True)
class Choice:
    """Experts of one layer in order of choice, and the divergence after each (if it was looked at).

    The first divergence is that of the layer with no routed expert at all.
    """

    experts: tuple[int, ...]
    divergence: tuple[float, ...] = ()


class Search:
    """The intact model over the calibration set, its MoE layers opened one after another."""

    def __init__(self, stream: LayerStream, statistics: list[LayerStatistics]):
        self.stream = stream
        self.statistics = {layer.info.index: layer for layer in statistics}
        self._hidden = list(stream.hidden)
        self._position = 0

    @torch.no_grad()
    def open(self, index: int) -> OpenLayer:
        """An MoE layer on the intact model's own hidden states; layers are asked for in order."""
        while self._position < index:
            batches = enumerate(self._hidden)
            self._hidden = [self.stream.replay(self._position, i, h) for i, h in batches]
            self._position += 1
        return self._open(index, self._hidden, index == len(self.stream.layers) - 1)

    def _open(self, index: int, hidden: list[Tensor], last: bool) -> OpenLayer:
        layer, statistics = self.stream.moe[index], self.statistics[index]
        opened = [self.stream.replay_open(index, i, h) for i, h in enumerate(hidden)]
        output, rest, x = (torch.cat(parts) for parts in zip(*opened, strict=True))
        finish = self.stream.finish if last else lambda h: h
        if layer.shared is not None:
            rest = rest + layer.shared(x) * shared_gate(statistics)
        outputs = torch.stack(
            [expert_forward(layer.experts, p, x) for p in expert_parameters(layer.experts)]
        )
        gates = mean_gates(statistics).to(rest.dtype)
        weight = torch.cat(self.stream.token_weight)
        return OpenLayer(layer, finish(output), rest, outputs, gates, weight, finish)


class PartlyCondensed:
    """A model some of whose layers are condensed, with the states before each decoder layer kept.

    Condensing one more layer is then tried by running only the layers from it on.
    """

    def __init__(self, stream: LayerStream, blocks: dict[int, nn.Module]):
        self.stream = stream
        self.blocks = blocks
        self.chosen: list[int] = []
        with torch.no_grad():
            self.before = self._run(0, list(stream.hidden))
            self.target = self._last_valid(self.before[-1])
        self.token_weight_T = torch.cat(stream.token_weight)

    @torch.no_grad()
    def divergence_with(self, index: int) -> float:
        """The last hidden state's JS divergence to the intact model, with `index` condensed too."""
        with self._condensed([*self.chosen, index]):
            states = self._run(index, self.before[index], keep=False)
        value_T = js_divergence(self.target, self._last_valid(states[-1]))
        return float(self.token_weight_T @ value_T.double())

    @torch.no_grad()
    def choose(self, index: int) -> None:
        """Condense `index` for good."""
        self.chosen.append(index)
        with self._condensed(self.chosen):
            self.before[index:] = self._run(index, self.before[index])

    def _run(self, start: int, hidden: list[Tensor], keep: bool = True) -> list[list[Tensor]]:
        """States before each decoder layer from `start` on, and after the last one."""
        states = [hidden]
        for index in range(start, len(self.stream.layers)):
            hidden = [self.stream.replay(index, i, h) for i, h in enumerate(hidden)]
            states = [*states, hidden] if keep else [hidden]
        return states

    def _last_valid(self, hidden: list[Tensor]) -> Tensor:
        pairs = zip(hidden, self.stream.valid, strict=True)
        return torch.cat([self.stream.finish(h)[valid] for h, valid in pairs])

    @contextmanager
    def _condensed(self, indices: list[int]) -> Iterator[None]:
        with ExitStack() as stack:
            for index in indices:
                stack.enter_context(swapped(self.stream, index, self.blocks[index]))
            yield
