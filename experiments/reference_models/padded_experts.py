"""A routed-experts function whose forward and backward are fast on a processor.

Every expert's tokens are gathered into one padded buffer, so that a layer is a few batched matrix
products; the buffer is as long as the busiest expert needs, so no token is dropped. Its length is
rounded up because the bfloat16 kernels are compiled anew for every shape they meet.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "padded_training"


def install(model: PreTrainedModel, capacity_step: int) -> None:
    """Make every routed-experts module of `model` use this function (SiLU experts only).

    capacity_step: the buffer holds a multiple of so many tokens for each expert.
    """
    function = functools.partial(padded_experts, capacity_step=capacity_step)
    ALL_EXPERTS_FUNCTIONS.register(NAME, torch.compiler.disable(function))
    model.set_experts_implementation(NAME)


def padded_experts(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    capacity_step: int,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

    Shapes: hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k]; the result
    has the shape of hidden_states.
    """
    slots, sources = _dispatch(top_k_index, self.num_experts, capacity_step)
    return _PaddedExperts.apply(
        hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, slots, sources
    )


def _dispatch(index: Tensor, num_experts: int, capacity_step: int) -> tuple[Tensor, Tensor]:
    """Where every assignment lies in the buffer, and which assignment every slot holds.

    Shapes: index [tokens, k] gives slots [tokens * k] and sources [experts * capacity]; an empty
    slot's source is tokens * k.
    """
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    capacity = -(-int(counts.max()) // capacity_step) * capacity_step
    experts = flat.index_select(0, order)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(flat.numel()) - starts.index_select(0, experts)
    sorted_slots = experts * capacity + rank
    slots = torch.empty_like(order).index_copy_(0, order, sorted_slots)
    sources = torch.full((num_experts * capacity,), flat.numel())
    return slots, sources.index_copy_(0, sorted_slots, order)


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))


def _activation(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _activation_gradient(inner: Tensor, d_activated: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_activated * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((d_gate, d_activated * silu), dim=-1)


_activation = torch.compile(_activation, dynamic=True)
_activation_gradient = torch.compile(_activation_gradient, dynamic=True)


class _PaddedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weights, gate_up, down, slots, sources):
        tokens, k = weights.shape
        width = hidden.size(1)
        token_of_slot = sources // k  # an empty slot's is `tokens`, the row of zeros
        rows = _with_zero_row(hidden).index_select(0, token_of_slot)
        rows = rows.view(gate_up.size(0), -1, width)
        inner = torch.bmm(rows, gate_up.transpose(1, 2))
        activated = _activation(inner)
        outputs = torch.bmm(activated, down.transpose(1, 2))
        per_token = outputs.view(-1, width).index_select(0, slots).view(tokens, k, -1)
        ctx.save_for_backward(
            rows, inner, activated, per_token, weights, gate_up, down, slots, sources, token_of_slot
        )
        return torch.bmm(weights.unsqueeze(1), per_token).squeeze(1)

    @staticmethod
    def backward(ctx, gradient):
        rows, inner, activated, per_token, weights, gate_up, down, slots, sources, token_of_slot = (
            ctx.saved_tensors
        )
        tokens, k = weights.shape
        d_weights = torch.bmm(per_token, gradient.unsqueeze(2)).squeeze(2)
        weight_of_slot = _with_zero_row(weights.reshape(-1)).index_select(0, sources)
        d_outputs = _with_zero_row(gradient).index_select(0, token_of_slot)
        d_outputs = d_outputs.mul_(weight_of_slot.unsqueeze(1)).view_as(rows)
        d_activated = torch.bmm(d_outputs, down)
        d_down = torch.bmm(d_outputs.transpose(1, 2), activated)
        d_inner = _activation_gradient(inner, d_activated)
        d_rows = torch.bmm(d_inner, gate_up)
        d_gate_up = torch.bmm(d_inner.transpose(1, 2), rows)
        d_hidden = d_rows.view(-1, rows.size(2)).index_select(0, slots).view(tokens, k, -1).sum(1)
        return d_hidden, d_weights, d_gate_up, d_down, None, None
