"""Sets of experts judged by what a layer's routed output becomes without the others.

Every expert's output for every token of a sample is computed once. What the layer gives with some
experts alone is then a choice among those outputs, by the router itself: an expert that moves up
into a token's choice, renormalised weights, groups and biases are exactly those of the pruned
layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moe_lab.finite import check_experts
from moe_lab.models.activations import Activations
from moe_lab.models.experts import expert_forward, expert_parameters, scales_input
from moe_lab.models.layers import MoELayer, check_kept
from moe_lab.models.probing import route
from moe_lab.models.routers import masked_layer, restricted_layer
from moe_lab.models.stream import LayerStream, States, check_state
from moe_lab.profile.profile import Answer, Profile
from moe_lab.progress import progress
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)
TOKENS_AT_ONCE = 1024  # all experts' outputs for so many tokens are in memory at a time
SETS_AT_ONCE = 32
NUMBERS_AT_ONCE = 2**24  # of a chunk's outputs, so many are copied to float64 at a time


@dataclass(frozen=True)
class Error:
    """How far a layer's routed output is from the intact one, as means over the sample's tokens.

    mse: the squared error, summed over the hidden units; cosine: the cosine distance, 1 - cos.
    """

    mse: float
    cosine: float


@dataclass(frozen=True)
class Chunk:
    """Some valid tokens at one intact layer, and what every expert makes of them.

    x_TD: what router and experts get; logits_TE, index_TK, weight_TK: what the router returns;
    outputs_ETD: each expert's output, before any weight; routed_TD: the intact routed sum.
    """

    x_TD: Tensor
    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    outputs_ETD: Tensor
    routed_TD: Tensor


class AllExperts:
    """All experts of one layer on all tokens of a sample; they lie in the stream's cache."""

    def __init__(self, layer: MoELayer, cache: Activations):
        _check_tellable(layer)
        self.layer, self.info, self.num_tokens = layer, layer.info, 0
        self._cache, self._num_chunks = cache, 0
        self._multiplied: set[int] = set()  # the chunks whose inner products are there

    def chunks(self) -> Iterator[Chunk]:
        """The tokens in order, at most TOKENS_AT_ONCE at a time."""
        for number in range(self._num_chunks):
            names = (field.name for field in fields(Chunk))
            yield Chunk(**{name: self._cache[name, number] for name in names})

    def error(self, kept: Sequence[int]) -> Error:
        """Of the layer with these experts alone, its router's rows of the others removed."""
        return self.errors([kept])[0]

    @torch.no_grad()
    def errors(self, sets: Sequence[Sequence[int]]) -> list[Error]:
        """The same for each of several sets, in one pass over the cached tokens.

        Of a token's outputs their inner products G [E, E] are enough: with c the change of its
        weights [E], the squared error is c G c. Routers that work on groups may be asked for sets
        with which no pruned layer could be left: then the others' logits and biases are -inf
        (`routers.masked_layer`).
        """
        sums = torch.zeros(len(sets), 2, dtype=torch.float64)
        for chunk in range(self._num_chunks):
            x_TD, index_TK, weight_TK = (
                self._cache[name, chunk] for name in ("x_TD", "index_TK", "weight_TK")
            )
            intact_TE = self._by_expert(index_TK, weight_TK)
            product_TEE = self._products(chunk)
            for first in range(0, len(sets), SETS_AT_ONCE):
                some = slice(first, first + SETS_AT_ONCE)
                weights = [self._weights(x_TD, kept) for kept in sets[some]]
                sums[some] += _distances(product_TEE, intact_TE, torch.stack(weights, dim=2))
        return [Error(*means) for means in (sums / self.num_tokens).tolist()]

    def _products(self, chunk: int) -> Tensor:
        """The inner products [T, E, E] of the experts' outputs for each token, made once."""
        name = "products", chunk
        if chunk not in self._multiplied:
            outputs_ETD = self._cache["outputs_ETD", chunk]
            tokens = max(1, NUMBERS_AT_ONCE // outputs_ETD[:, 0].numel())
            parts = (part.transpose(0, 1).double() for part in outputs_ETD.split(tokens, dim=1))
            self._cache[name] = torch.cat([part @ part.transpose(1, 2) for part in parts])
            self._multiplied.add(chunk)
        return self._cache[name]

    def _weights(self, x_TD: Tensor, kept: Sequence[int]) -> Tensor:
        """Each expert's weight [T, E] where the router is left with these."""
        with self._only(kept):
            _, weight_TK, index_TK = route(self.layer, x_TD)
        return self._by_expert(index_TK, weight_TK)

    def _by_expert(self, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        weight_TK = weight_TK.double()
        zeros = weight_TK.new_zeros(len(index_TK), self.info.num_experts)
        return zeros.scatter_add_(1, index_TK, weight_TK)

    def _only(self, kept: Sequence[int]) -> AbstractContextManager[None]:
        possible = can_keep(self.info, kept)
        return (restricted_layer if possible else masked_layer)(self.layer, sorted(kept))

    def add(self, x_TD: Tensor) -> None:
        """Take in tokens, while the layer's weights are there; NotFinite where an output is not."""
        parameters = expert_parameters(self.layer.experts)
        for x in x_TD.split(TOKENS_AT_ONCE):
            logits, weight, index = route(self.layer, x)
            outputs = x.new_empty(len(parameters), *x.shape)  # filled in place: never held twice
            for expert, weights in enumerate(parameters):
                outputs[expert] = expert_forward(self.layer.experts, weights, x)
            check_outputs(outputs, self.info.index)
            routed = routed_sum(outputs, index, weight)
            chunk = Chunk(x, logits, index, weight, outputs, routed)
            for field in fields(Chunk):
                self._cache[field.name, self._num_chunks] = getattr(chunk, field.name)
            self._num_chunks += 1
            self.num_tokens += len(x)

    def add_batch(self, stream: LayerStream, batch: int, hidden: Tensor, valid: Tensor) -> Tensor:
        """Take in the `valid` tokens [B, L] of a batch; returns what its decoder layer gives.

        hidden: what goes into the decoder layer, whose weights are in memory, [B, L, D].
        """
        with _caught(self.layer) as caught:
            output = stream.replay(self.info.index, batch, hidden)
        x = _input_of_experts(self.layer, caught)
        self.add(x[valid.reshape(-1).to(x.device)])
        return output

    def close(self) -> None:
        """Give the memory back."""
        for number in range(self._num_chunks):
            for name in (*(field.name for field in fields(Chunk)), "products"):
                self._cache.pop((name, number))
        self._num_chunks = 0


def check_outputs(outputs_ETD: Tensor, index: int) -> None:
    """Refuse outputs that are not finite: tokens that a router sends elsewhere may be too large."""
    if outputs_ETD.shape[1]:
        extremes = [torch.stack(one.aminmax()) for one in outputs_ETD]
        check_experts(torch.stack(extremes), "its output on a token of the sample", index)


def _distances(product_TEE: Tensor, intact_TE: Tensor, changed_TEN: Tensor) -> Tensor:
    """Sums [N, 2] over tokens of what `Error` has means of, for N other weights of the experts."""
    change_TEN = changed_TEN - intact_TE[..., None]
    along_TE = (product_TEE @ intact_TE[..., None])[..., 0]
    square_TN = (change_TEN * (product_TEE @ change_TEN)).sum(dim=1)
    along_TN = (change_TEN * along_TE[..., None]).sum(dim=1)
    norm_T1 = (intact_TE * along_TE).sum(dim=1, keepdim=True)
    norms_TN = (norm_T1 * (norm_T1 + 2 * along_TN + square_TN)).clamp(min=1e-300).sqrt()
    distance_TN = (1 - (norm_T1 + along_TN) / norms_TN).where(square_TN > 0, 0.0)
    return torch.stack([square_TN.sum(dim=0), distance_TN.sum(dim=0)], dim=1).cpu()


def can_keep(info: LayerInfo, kept: Sequence[int]) -> bool:
    """Whether a pruned layer could be left with these experts: enough, the same in each group."""
    size = info.num_experts // info.groups
    of_group = [sum(expert // size == group for expert in kept) for group in range(info.groups)]
    try:
        check_kept(info, len(kept))
    except UserError:
        return False
    return len(set(of_group)) == 1


def routed_sum(outputs_ETD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The routed sum [T, D], at least in float32: sum_k weight_k * outputs[index_k]."""
    token_T1 = torch.arange(len(index_TK), device=index_TK.device)[:, None]
    chosen_TKD = outputs_ETD[index_TK, token_T1]
    exact = torch.promote_types(chosen_TKD.dtype, torch.float32)
    return (chosen_TKD.to(exact) * weight_TK[..., None].to(exact)).sum(dim=1)


def _check_tellable(layer: MoELayer) -> None:
    """Refuse a layer of which it cannot be told what it is without some of its experts."""
    told = "what the layer is without some of its experts cannot be told for this family"
    if layer.info.zero_experts:
        raise UserError(f"{layer.info.family} has zero experts, which copy what they get: {told}")
    if scales_input(layer.experts):
        raise UserError(
            f"{layer.info.family} multiplies what its experts get by the router's "
            f"weights, which change without some of them: {told}"
        )


class ExpertSample:
    """The intact model's MoE layers on a stream's tokens, with every expert's output.

    Says what that costs before it begins.
    """

    def __init__(self, stream: LayerStream):
        self.stream, self._states = stream, States(stream)
        infos = [layer.info for layer in stream.moe.values()]
        _check_tellable(next(iter(stream.moe.values())))
        tokens = sum(int(valid.sum()) for valid in stream.valid)
        times = sum(info.num_experts for info in infos) / sum(info.top_k for info in infos)
        most = max(info.num_experts for info in infos)
        logger.info(
            "every expert on every token of the sample: %d experts x %d tokens at each layer that "
            "is asked for, where a forward pass computes %d for each token; all layers cost what "
            "the experts of about %.0f forward passes cost",
            most, tokens, infos[0].top_k, times,
        )  # fmt: skip
        size = (most + 4) * stream.state_bytes() + 8 * most**2 * tokens
        stream.cache.announce({"every expert's output at one layer": size})

    @contextmanager
    def open(self, index: int) -> Iterator[AllExperts]:
        """An MoE layer and all its experts' outputs; layers are asked for in ascending order.

        Raises UserError for families whose experts get anything but what their router gets, or
        whose routed sum is not that of their outputs times their weights.
        """
        opened = AllExperts(self.stream.moe[index], self.stream.cache)

        def compute(batch: int, hidden: Tensor) -> Tensor:
            return opened.add_batch(self.stream, batch, hidden, self.stream.valid[batch])

        self._states.pass_through(index, compute)
        try:
            with self.stream.layer(index):
                yield opened
        finally:
            opened.close()


@contextmanager
def _caught(layer: MoELayer) -> Iterator[dict[str, Tensor]]:
    """What the router and the experts of a layer get and give while it is open."""
    caught: dict[str, Tensor] = {}

    def router(module: torch.nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        caught["routed"] = args[0]

    def experts(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        caught["x"], caught["index"], caught["weight"] = args
        caught["sum"] = output

    handles = [
        layer.router.register_forward_hook(router),
        layer.experts.register_forward_hook(experts),
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _input_of_experts(layer: MoELayer, caught: dict[str, Tensor]) -> Tensor:
    """The tokens [T, D], padding included, once it is sure that the layer is the usual sum."""
    x, routed = (caught[name].reshape(-1, caught[name].shape[-1]) for name in ("x", "routed"))
    if x.shape != routed.shape or not torch.equal(x, routed):
        check_state(x, layer.info.index)
        raise UserError(
            f"the experts of {type(layer.block).__name__} get something else than their router: "
            "what the layer is without some of them cannot be told for this family"
        )
    few = slice(0, 8)
    parameters = expert_parameters(layer.experts)
    outputs = torch.stack([expert_forward(layer.experts, one, x[few]) for one in parameters])
    expected = routed_sum(outputs, caught["index"][few], caught["weight"][few])
    output = caught["sum"].reshape(x.shape)[few].to(expected)
    if (output - expected).abs().max() > 0.02 * expected.abs().max():
        raise UserError(
            f"{type(layer.experts).__name__} does more than add its experts' weighted outputs: "
            "what the layer is without some of them cannot be told for this family"
        )
    return x


def answers(
    profile: Profile,
    num_samples: int | None,
    questions: Mapping[int, Mapping[str, Any]],
    ask: Callable[[AllExperts], Answer],
    code: Sequence[object],
    remember: Callable[..., Answer] | None = None,
) -> dict[int, Answer]:
    """What `ask` (plain JSON values) says of each layer of `questions`, by layer index.

    questions: by layer index, what an answer is known by beside the layer and the sample, the first
    `num_samples` documents of the calibration set (None: all). Answers that are remembered cost
    nothing, and where all are, no model is opened. code: what `ask` depends on beside this module.
    remember: `profile.remember_tensors` where `ask` gives tensors by name; None: `remember`.
    """

    @functools.cache
    def sample() -> ExpertSample:
        return ExpertSample(profile.open_stream(num_samples))

    def answer(index: int) -> Answer:
        def work() -> Answer:
            with sample().open(index) as experts:
                return ask(experts)

        known_by = {**questions[index], "layer": index, "num_samples": num_samples}
        return (remember or profile.remember)(known_by, work, [Error, *code])

    return {index: answer(index) for index in progress(sorted(questions), "sets of experts")}


def as_json(errors: Sequence[Error]) -> list[dict[str, float]]:
    """Errors as plain values."""
    return [asdict(error) for error in errors]
