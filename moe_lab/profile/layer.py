"""The sums of one MoE layer: what every criterion is a formula over.

Sums are over valid tokens and in float64, so that those of batches, processes and restarts add up
to the same values; nothing is divided before a metric needs it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_lab.finite import check_experts, check_number
from moe_lab.models.routers import SCORINGS, matching_scoring
from moe_lab.types import LayerInfo, Routing, UserError

# Known only where the router's scoring is.
OF_PROBABILITY = ("probability_sum", "entropy_sum")
# Known only where a token has one hidden state, to which the block adds.
AROUND = ("gate_norm_change_sum", "block_cosine_sum", "layer_cosine_sum")
# What a message calls some of them; all others by their names.
STATISTICS_IN_WORDS = {
    "router_norm": "the norm of its router row",
    "weight_abs_sum": "the sum of its weights' absolute values",
    "weight_square_sum": "the sum of its weights' squares",
    "logit_product_sum": "the router's logit",
    "gate_sum": "the router's weight",
    "norm_sum": "the norm of its output",
    "output_sum": "its output",
    "block_cosine_sum": "what leaves it",
    "layer_cosine_sum": "what leaves it",
    "shared_gate_sum": "the gate of its shared expert",
}
# What is no sum: parts of the data combine by the larger one, or have the same.
MAXIMA = ("max_activation", "hidden_max", "gate_hidden_max")
CONSTANTS = ("router_norm", "weight_abs_sum", "weight_square_sum", "weight_count")
# Of the weights, too, for each hidden unit; known where neurons were asked for.
OF_NEURONS = ("down_abs_sum", "down_square_sum", "neuron_square_sum")
OVER_TOKENS = (
    "hidden_sum", "hidden_square_sum", "gate_hidden_square_sum", "hidden_max", "gate_hidden_max",
)  # fmt: skip
NEURON_STATISTICS = (*OVER_TOKENS, *OF_NEURONS)
CACHED = 2**15  # numbers that are worked on at a time: copies of them stay in a CPU's cache
SHARED = "shared_"  # before the names of the same statistics of the shared experts' hidden units
# Over the tokens routed to an expert, of g^a ||f||^b: by (a, b), its weight g and its output f.
POWERS = {
    (0, 0): "count",
    (1, 0): "gate_sum",
    (2, 0): "gate_square_sum",
    (0, 1): "norm_sum",
    (1, 1): "gate_norm_sum",
    (2, 1): "gate_square_norm_sum",
    (0, 2): "norm_square_sum",
    (1, 2): "gate_norm_square_sum",
    (2, 2): "gate_square_norm_square_sum",
}


class LayerStatistics:
    """The sums of one layer, float64.

    Of the router alone. Per expert [E]: count, tokens that the router sent to it; gate_sum and
    gate_square_sum, of its router weight over them; probability_sum, of the router's full
    probability over all tokens (SEER-MoE 2404.05089, soft count). Per pair of experts [E, E]:
    pair_count, tokens sent to both (on the diagonal count); logit_product_sum, of the products of
    their router logits. Per place in a token's choice, heaviest first: rank_count [K, E], tokens
    that gave each expert this place; rank_share_sum [K], of the share that the weight there has of
    the token's. Scalars [1]: tokens; entropy_sum, of the entropy in nats of the full probability
    (scores that do not add up to 1 are divided by their sum first); zero_count, tokens that zero
    experts got, where there are any: they stand in no other sum but those of a token's choice.

    Of the experts and what is around them. Per expert [E], over the tokens sent to it: the other
    sums of POWERS; max_activation, no sum but the largest absolute component of its output;
    gate_norm_change_sum, of weight times norm times 1 - cos(h, h + routed), h what the MoE sublayer
    adds to and routed what its routed experts give together (EASY-EP 2504.06792). output_sum
    [E, D], of its output before any weight. Scalars [1]: shared_gate_sum, of the shared expert's
    sigmoid gate over all tokens; block_cosine_sum and layer_cosine_sum, of the cosine between what
    enters and what leaves the decoder layer, or its MoE sublayer alone (x and x + MoE(norm(x)); He
    et al. 2406.02500).

    Of the weights, the same in every part of the data: CONSTANTS, see `weights.constants`.

    Of the hidden units of each expert [E, I], only where a metric asked for neurons: over the
    tokens sent to it, with a unit's activation a (what the down projection gets) and the router's
    weight g: hidden_sum, of a; hidden_square_sum, of a^2; gate_hidden_square_sum, of (g a)^2;
    hidden_max and gate_hidden_max, no sums but the largest |a| and |g a|. Of the weights:
    OF_NEURONS, see `weights.neuron_statistics`. All of them with "shared_" before their names are
    of the hidden units of the shared experts [1, I], whose g is their gate or 1, and which see all
    tokens (`shared`).
    """

    def __init__(
        self,
        info: LayerInfo,
        sums: dict[str, Tensor] | None = None,
        scoring: str | None = None,
    ):
        self.info = info
        self._sums = sums or {}
        self.scoring = scoring  # None: found by looking at the first batch

    @property
    def sums(self) -> dict[str, Tensor]:
        """All of them by name, on the CPU.

        While batches are added they lie where these are computed; a GPU has to be waited for only
        where somebody reads them.
        """
        away = {name: value for name, value in self._sums.items() if value.device.type != "cpu"}
        self._sums |= {name: value.cpu() for name, value in away.items()}
        return self._sums

    @sums.setter
    def sums(self, sums: dict[str, Tensor]) -> None:
        self._sums = sums

    def add(self, routing: Routing) -> None:
        """Add one batch."""
        self.add_routed(routing.logits_TE, routing.index_TK, routing.weight_TK)
        norm_S = self._add_outputs(routing)
        weight_S = routing.weight_S.double()
        gate = (torch.ones_like(weight_S), weight_S, weight_S.square())
        norm = (norm_S, norm_S.square())
        values = {name: gate[a] * norm[b - 1] for (a, b), name in POWERS.items() if b}
        # Half precision would overflow and round: at least float32 is used.
        exact = torch.promote_types(routing.y_SD.dtype, torch.float32)
        if routing.residual_TD is not None and routing.routed_TD is not None:
            change_T = _change(routing.residual_TD.to(exact), routing.routed_TD.to(exact))
            values["gate_norm_change_sum"] = values["gate_norm_sum"] * change_T[routing.token_S]
        sums = self._per_expert(routing.expert_S, *values.values())
        for name, sum_E in zip(values, sums, strict=True):
            self._add(name, sum_E)
        if routing.leaving_TD is not None:
            leaving = routing.leaving_TD.to(exact)
            for name, state in (("block", routing.entering_TD), ("layer", routing.residual_TD)):
                if state is not None:
                    cosine_T = _cosine(state.to(exact), leaving)
                    self._add(f"{name}_cosine_sum", cosine_T.sum(dtype=torch.float64)[None])
        if routing.shared_gate_T is not None:
            self._add("shared_gate_sum", routing.shared_gate_T.double().sum()[None])
        self._add_hidden(routing)

    def _add_hidden(self, routing: Routing) -> None:
        """Add what is said of hidden units, where they were asked for."""
        if (h_SI := routing.hidden_SI) is not None:
            number, expert_S = self.info.num_experts, routing.expert_S
            self._add_neurons("", _of_neurons(h_SI, routing.weight_S, expert_S, number))
        if (h_TI := routing.shared_hidden_TI) is not None:
            gate_T = routing.shared_gate_T
            gate_T = h_TI.new_ones(len(h_TI)) if gate_T is None else gate_T
            only_T = torch.zeros(len(h_TI), dtype=torch.long, device=h_TI.device)
            self._add_neurons(SHARED, _of_neurons(h_TI, gate_T, only_T, 1))

    def _add_neurons(self, prefix: str, found: dict[str, Tensor]) -> None:
        for name, value_EI in found.items():
            self._add(prefix + name, value_EI)

    @property
    def has_neurons(self) -> bool:
        """Whether hidden units were asked for."""
        return "hidden_square_sum" in self.sums

    def shared(self) -> LayerStatistics:
        """The hidden units of the shared experts as those of one expert that saw all tokens.

        UserError where nothing is known of them.
        """
        self[f"{SHARED}hidden_square_sum"]
        sums = {name: self.sums[SHARED + name] for name in NEURON_STATISTICS}
        count = {"count": self["tokens"], "tokens": self["tokens"]}
        info = dataclasses.replace(self.info, num_experts=1, expert_width=self.info.shared_width)
        return LayerStatistics(info, sums | count, self.scoring)

    def _add_outputs(self, routing: Routing) -> Tensor:
        """Add what is said of each expert's outputs alone; returns their norms [S].

        They go to float64 a few rows at a time: no copy of all of them is made.
        """
        y_SD, number = routing.y_SD, self.info.num_experts
        output_ED = y_SD.new_zeros(number, y_SD.shape[1], dtype=torch.float64)
        largest_E = y_SD.new_zeros(number)
        norms = [output_ED.new_zeros(0)]
        held_ND = _held_for(y_SD)
        for y_ND, expert_N in _few_rows(y_SD, routing.expert_S):
            exact_ND = held_ND[: len(y_ND)].copy_(y_ND)
            norms.append(torch.linalg.vector_norm(exact_ND, dim=1))
            output_ED.index_add_(0, expert_N, exact_ND)
            largest_N = torch.maximum(y_ND.amax(dim=1), -y_ND.amin(dim=1))
            largest_E.scatter_reduce_(0, expert_N, largest_N, "amax")
        self._add("output_sum", output_ED)
        self._add("max_activation", largest_E.double())
        return torch.cat(norms)

    def add_routed(self, logits_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
        """Add what the router made of one batch: all that needs no more than this.

        An index of E is no expert: some routers may choose none.
        """
        tokens = len(index_TK)
        if self.scoring is None and tokens:
            self.scoring = matching_scoring(logits_TE, index_TK, weight_TK)
        num_experts = self.info.num_experts  # logits and indices are also of zero experts
        # Families differ in the order of the chosen experts: here the heaviest comes first.
        weight_TK, order_TK = weight_TK.double().sort(dim=1, descending=True, stable=True)
        index_TK = index_TK.gather(1, order_TK)
        logits_TE = logits_TE.double()
        rank_KE = logits_TE.new_zeros(index_TK.shape[1], self.info.num_rows + 1)
        rank_KE.scatter_add_(1, index_TK.T, torch.ones_like(weight_TK.T))
        rank_KE = rank_KE[:, :num_experts]
        self._add("tokens", torch.tensor([float(tokens)], dtype=torch.float64))
        self._add("count", rank_KE.sum(dim=0))
        if self.info.zero_experts:
            self._add("zero_count", (index_TK >= num_experts).sum(dtype=torch.float64)[None])
        expert_S, weight_S = index_TK.flatten(), weight_TK.flatten()
        gate_E, gate_square_E = self._per_expert(expert_S, weight_S, weight_S.square())
        self._add("gate_sum", gate_E)
        self._add("gate_square_sum", gate_square_E)
        chosen_TE = torch.zeros(tokens, self.info.num_rows + 1, device=logits_TE.device)
        chosen_TE = chosen_TE.scatter_(1, index_TK, 1.0)[:, :num_experts]
        real_TE = logits_TE[:, :num_experts]
        self._add("pair_count", (chosen_TE.T @ chosen_TE).double())  # exact: whole numbers
        self._add("logit_product_sum", _products(real_TE))
        self._add("rank_count", rank_KE)
        share_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True)
        share_TK = share_TK.where(weight_TK > 0, 0.0)  # of a token that gets no expert at all
        self._add("rank_share_sum", share_TK.sum(dim=0))
        if self.scoring is not None:
            probability_TE = SCORINGS[self.scoring](logits_TE)
            # Scores may all be too small for float64: then no expert has a share.
            tiny = torch.finfo(probability_TE.dtype).tiny
            self._add("probability_sum", probability_TE.sum(dim=0)[:num_experts])
            share_TE = probability_TE.div_(probability_TE.sum(dim=1, keepdim=True).clamp(min=tiny))
            # log of the smallest number where a share is 0: their product is 0 as it should be.
            log_TE = share_TE.clamp(min=tiny).log_()
            self._add("entropy_sum", -log_TE.mul_(share_TE).sum()[None])

    def _per_expert(self, expert_S: Tensor, *values_S: Tensor) -> tuple[Tensor, ...]:
        """The sums [E] of each of these values; an expert behind the last is none."""
        values_SN = torch.stack(values_S, dim=1)
        sum_EN = values_SN.new_zeros(self.info.num_rows + 1, len(values_S))
        return (
            sum_EN.index_add_(0, expert_S, values_SN)[: self.info.num_experts]
            .T.contiguous()
            .unbind()
        )

    def _add(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            value = combined(name, [self._sums[name].to(value.device), value])
        self._sums[name] = value

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            reason = f"it has {sorted(self.sums)}"
            if name in OF_PROBABILITY:
                reason = (
                    "its router's weights follow none of the known scorings "
                    f"({', '.join(SCORINGS)}), so it has no full probability"
                )
            if name in AROUND:
                reason = (
                    "around its MoE block there is not one hidden state for each token that it "
                    f"adds to, as in other families ({self.info.family})"
                )
            if name in NEURON_STATISTICS:
                reason = "it was profiled without the hidden units of its experts"
            if name.startswith(SHARED):
                reason = "it has no shared experts whose hidden units are known"
            raise UserError(f"layer {self.info.index} has no statistic {name!r}: {reason}")
        return self.sums[name]

    def check_finite(self) -> None:
        """Refuse sums that are not finite: NotFinite names the layer and the first expert.

        What comes first of a token's way through the layer is looked at first, so that the message
        names where it began: NaN spreads from there to all that follows.
        """
        index, sums = self.info.index, self.sums
        order = (*CONSTANTS, "logit_product_sum", "gate_sum", *OF_PROBABILITY, *sums)
        for name in (name for name in dict.fromkeys(order) if name in sums):
            value = sums[name]
            if name == "logit_product_sum":  # its rows and columns are of pairs
                value = value.diagonal()
            what = STATISTICS_IN_WORDS.get(name, f"the statistic {name}")
            if len(value) == self.info.num_experts:
                check_experts(value, what, index)
            else:
                check_number(float(value.sum()), f"layer {index}: {what}", index)

    def usage(self) -> Tensor:
        """Each expert's share of the routed slots times the number of experts, [E]: 1 is even."""
        return self["count"] * self.info.num_experts / (self["tokens"] * self.info.top_k)

    def has_cosine(self, name: str) -> bool:
        """Whether there is such a cosine: not where a token has several hidden states."""
        return f"{name}_cosine_sum" in self.sums

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


def _of_neurons(h_SI: Tensor, gate_S: Tensor, expert_S: Tensor, number: int) -> dict[str, Tensor]:
    """What one batch says of the hidden units of so many experts, each [E, I]; 0 without tokens."""
    shape = number, h_SI.shape[1]
    sums = {name: h_SI.new_zeros(shape, dtype=torch.float64) for name in OVER_TOKENS}
    size_held, square_held = _held_for(h_SI), _held_for(h_SI)
    for h_NI, gate_N, expert_N in _few_rows(h_SI, gate_S, expert_S):
        size_NI, square_NI = size_held[: len(h_NI)], square_held[: len(h_NI)]
        sums["hidden_sum"].index_add_(0, expert_N, size_NI.copy_(h_NI))
        for gated, factor_N in (("", None), ("gate_", gate_N)):
            size_NI.abs_() if factor_N is None else size_NI.mul_(factor_N.double()[:, None].abs())
            torch.square(size_NI, out=square_NI)
            sums[f"{gated}hidden_square_sum"].index_add_(0, expert_N, square_NI)
            expert_NI = expert_N[:, None].expand(h_NI.shape)
            sums[f"{gated}hidden_max"].scatter_reduce_(0, expert_NI, size_NI, "amax")
    return sums


def _rows_at_once(one_ND: Tensor) -> int:
    """How many rows are in float64 at a time: few, that they stay in a CPU's cache.

    On a GPU, where each product starts a kernel, they are more.
    """
    numbers = CACHED if one_ND.device.type == "cpu" else CACHED * 128
    return max(1, numbers // max(1, one_ND.shape[1]))


def _few_rows(first_ND: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of all of these at a time."""
    rows = _rows_at_once(first_ND)
    return zip(*(one.split(rows) for one in (first_ND, *others)), strict=True)


def _held_for(one_ND: Tensor) -> Tensor:
    """Where a few rows go in float64: a new place each time would cost more than their sums."""
    return one_ND.new_empty(
        min(_rows_at_once(one_ND), len(one_ND)), one_ND.shape[1], dtype=torch.float64
    )


def _products(logits_TE: Tensor) -> Tensor:
    """Sums over tokens of the products of two experts' logits [E, E]; a masked one (-inf) is 0."""
    known_TE = logits_TE.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)
    return known_TE.T @ known_TE


def combined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """What `name` is over all of the data, from what it is over parts of it."""
    name = name.removeprefix(SHARED)
    if name in (*CONSTANTS, *OF_NEURONS):
        return parts[0]
    return functools.reduce(torch.maximum if name in MAXIMA else torch.add, parts)


def _cosine(one_TD: Tensor, other_TD: Tensor) -> Tensor:
    """Of each row [T], float64; 0 where a state is 0. torch's own takes five times as long."""
    one_T, other_T = (torch.linalg.vector_norm(x, dim=-1).double() for x in (one_TD, other_TD))
    norm_T = (one_T * other_T).clamp(min=torch.finfo(torch.float64).tiny)
    cosine_T: Tensor = torch.linalg.vecdot(one_TD, other_TD).double() / norm_T
    return cosine_T


def _change(state_TD: Tensor, added_TD: Tensor) -> Tensor:
    """1 - cos(state, state + added) [T] in float64, also where it is far below rounding.

    With a = state, m = added, b = a + m: sin^2 = (|a|^2 |m|^2 - (a m)^2) / (|a|^2 |b|^2), and
    1 - cos = sin^2 / (1 + cos), which has no difference of two almost equal numbers.
    """
    aa_T, am_T, mm_T = (
        torch.linalg.vecdot(one, other).double()
        for one, other in ((state_TD, state_TD), (state_TD, added_TD), (added_TD, added_TD))
    )
    scale_T = aa_T * (aa_T + 2 * am_T + mm_T).clamp(min=0)
    cosine_T = ((aa_T + am_T) / scale_T.sqrt()).nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
    sine_T = ((aa_T * mm_T - am_T.square()) / scale_T).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    return torch.where(cosine_T > 0, sine_T / (1 + cosine_T), 1 - cosine_T)
