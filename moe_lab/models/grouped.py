"""The experts where nobody looks at what each of them gives: whole arrays, a product for each.

`observing.py` keeps what each expert computes apart; here there is one array between the two
products, and a backward pass that knows where each row came from. Letters beside those of types.py:
P = T * K pairs of a token and an expert, token by token; S the same pairs sorted by expert, those
of nobody (an index behind all experts) last.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_lab.models.adapters.base import AdaptedExperts
from moe_lab.models.experts import Experts, OneExpert, rows_of_each, scales_input
from moe_lab.models.layers import moe_layers
from moe_lab.models.narrowing import GROUPED_BYTES

GROUPED_EXPERTS = "moe_lab_grouped"
WIDENED = ("gate_up_proj", "up_proj", "down_proj")


class _ToPairs(torch.autograd.Function):
    """Each pair's token [S, D]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_S: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return F.embedding_bag(place_TK, gradients[0], mode="sum"), None, None


class _ToTokens(torch.autograd.Function):
    """The weighted sum of each token's pairs [T, D]."""

    @staticmethod
    def forward(
        ctx: Any, y_SD: Tensor, weight_TK: Tensor, pair_S: Tensor, place_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_SD, weight_TK, pair_S, place_TK)
        return F.embedding_bag(place_TK, y_SD, mode="sum", per_sample_weights=weight_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        y_SD, weight_TK, pair_S, place_TK = ctx.saved_tensors
        g_SD = gradients[0].index_select(0, pair_S // weight_TK.shape[1])
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (g_SD * y_SD).sum(dim=1)[place_TK]
        weight_S = weight_TK.reshape(-1)[pair_S]
        return g_SD.mul_(weight_S[:, None]), for_weight, None, None


class RowsOfExperts:
    """Which of S sorted rows are whose expert's: as whole numbers, or where the products lie.

    Products expert by expert need the numbers, for which a GPU has to be waited for; those in one
    call (`in_one_call`) do not. expert_S: the rows' experts; those of nobody are `number`, or more.
    """

    def __init__(self, expert_S: Tensor, number: int):
        self.expert_S = expert_S
        self.nobody_S1 = (expert_S >= number)[:, None]
        self.count_E = rows_of_each(expert_S, number)
        self.ends_E = self.count_E.cumsum(0, dtype=torch.int32)

    @functools.cached_property
    def counts(self) -> list[int]:
        """How many rows each expert has."""
        counts: list[int] = self.count_E.tolist()
        return counts

    def by_expert(self, x_SI: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert."""
        parts: tuple[Tensor, ...] = x_SI[: sum(self.counts)].split(self.counts)
        return parts


def in_one_call(x_SI: Tensor, weight_EIO: Tensor) -> bool:
    """Whether torch has a kernel for these products of all experts, and not a loop of its own."""
    fit = not any(width * x_SI.element_size() % GROUPED_BYTES for width in weight_EIO.shape[1:])
    return fit and x_SI.is_cuda and x_SI.dtype == torch.bfloat16


class _Products(torch.autograd.Function):
    """x_SI times the matrix [I, O] of each pair's expert; 0 for pairs of nobody."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EIO: Tensor, rows: RowsOfExperts) -> Tensor:
        ctx.save_for_backward(x_SI, weight_EIO)
        ctx.rows = rows
        return _products(x_SI, weight_EIO, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SI, weight_EIO = ctx.saved_tensors
        g_SO, rows, for_x, for_weight = gradients[0].contiguous(), ctx.rows, None, None
        if ctx.needs_input_grad[0]:
            for_x = _products(g_SO, weight_EIO.transpose(1, 2), rows)
        if ctx.needs_input_grad[1]:
            for_weight = _products_of_rows(x_SI, g_SO, weight_EIO, rows)
        return for_x, for_weight, None


def _products(x_SI: Tensor, weight_EIO: Tensor, rows: RowsOfExperts) -> Tensor:
    if in_one_call(x_SI, weight_EIO):
        made_SO = F.grouped_mm(x_SI, weight_EIO.to(x_SI.dtype), offs=rows.ends_E)
        return made_SO.masked_fill_(rows.nobody_S1, 0)  # where it wrote nothing
    made_SO = x_SI.new_empty(len(x_SI), weight_EIO.shape[2])
    made_SO[sum(rows.counts) :] = 0
    parts = zip(weight_EIO, rows.by_expert(x_SI), rows.by_expert(made_SO), strict=True)
    for weight, x, into in parts:
        if len(x):
            torch.mm(x, weight.to(x.dtype), out=into)
    return made_SO


def _products_of_rows(
    x_SI: Tensor, g_SO: Tensor, weight_EIO: Tensor, rows: RowsOfExperts
) -> Tensor:
    """Of the rows of each expert x^T g, like its matrix."""
    if in_one_call(x_SI, weight_EIO):
        return F.grouped_mm(x_SI.t(), g_SO, offs=rows.ends_E)
    made_EIO = torch.zeros_like(weight_EIO)
    for into, x, g in zip(made_EIO, rows.by_expert(x_SI), rows.by_expert(g_SO), strict=True):
        if len(x):
            torch.mm(x.t(), g, out=into)
    return made_EIO


def _linear(experts: Experts, name: str, x_SI: Tensor, rows: RowsOfExperts) -> Tensor:
    """One of the experts' projections [S, O], in autocast's dtype where that is on."""
    dtype, device = x_SI.dtype, x_SI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weight = getattr(experts, name)[: len(rows.count_E)]
    weight = weight.to(dtype) if weight.requires_grad else weight  # else one expert's at a time
    weight_EIO = weight if experts.is_transposed else weight.transpose(1, 2)
    y_SO: Tensor = _Products.apply(x_SI.to(dtype), weight_EIO, rows)  # type: ignore[no-untyped-call]
    if not experts.has_bias:
        return y_SO
    bias_EO: Tensor = getattr(experts, f"{name}_bias").to(dtype)
    return y_SO + bias_EO[rows.expert_S.clamp(max=len(bias_EO) - 1)]


def _grouped_experts(
    self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum [T, D] of the chosen experts' outputs."""
    number, num_chosen = len(self.down_proj), top_k_index.shape[1]
    expert_S, pair_S = top_k_index.reshape(-1).sort(stable=True)
    place_P = torch.empty_like(pair_S)
    place_P[pair_S] = torch.arange(len(pair_S), device=pair_S.device)
    place_TK = place_P.view(top_k_index.shape)
    rows = RowsOfExperts(expert_S, number)
    weight_TK, nobody_TK = top_k_weights, top_k_index >= number
    x_SD: Tensor = _ToPairs.apply(hidden_states, pair_S // num_chosen, place_TK)  # type: ignore[no-untyped-call]
    if scales_input(self):
        x_SD = x_SD * weight_TK.reshape(-1)[pair_S][:, None]
        weight_TK = torch.ones_like(weight_TK)
    h_SI = _linear(self, "gate_up_proj" if self.has_gate else "up_proj", x_SD, rows)
    h_SI = self._apply_gate(h_SI) if self.has_gate else self.act_fn(h_SI)
    y_SD = _linear(self, "down_proj", h_SI, rows)
    if self.has_post_expert_norm:
        y_SD = self.post_expert_norm(y_SD)
    dtype = torch.promote_types(y_SD.dtype, weight_TK.dtype)
    weight_TK = weight_TK.masked_fill(nobody_TK, 0).to(dtype)
    out_TD: Tensor = _ToTokens.apply(y_SD.to(dtype), weight_TK, pair_S, place_TK)  # type: ignore[no-untyped-call]
    return out_TD.to(hidden_states.dtype)


def experts_in_files_dtype(model: PreTrainedModel) -> list[nn.Parameter]:
    """The matrices of routed experts that do not train: GROUPED_EXPERTS widens them as it goes."""
    return [
        one
        for experts in (layer.experts for layer in moe_layers(model))
        if not isinstance(experts, (AdaptedExperts, OneExpert))
        for name, one in experts.named_parameters(recurse=False)
        if name in WIDENED and not one.requires_grad
    ]


def widen_but_experts(model: PreTrainedModel) -> None:
    """Have all of a model but its `experts_in_files_dtype` in float32, in place.

    These stay in the dtype that they have, and are widened one by one as they are multiplied, so
    that the results are those of a model in float32, to the bit.
    """
    narrow = {id(one) for one in experts_in_files_dtype(model)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and id(tensor) not in narrow:
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))


ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, _grouped_experts)
