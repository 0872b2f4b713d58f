"""DBRX: its block chooses the experts, whose weights lie in flat tensors [E * I, D]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dbrx import modeling_dbrx as stock

from moe_lab.models.adapters.base import AdaptedExperts, become


class DbrxContractRouter(stock.DbrxRouter):
    """The stock router and, behind it, the choice that the stock block makes."""

    top_k: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = super().forward(hidden_states)
        block: Any = self  # whose two fields the choice reads
        return logits_TE, *stock.DbrxFFN.route_tokens_to_experts(block, logits_TE)


class DbrxContractExperts(AdaptedExperts, stock.DbrxExperts):
    """The stock experts. gate_up_proj is a copy, made when it is asked for."""

    def alone(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return stock.DbrxExperts.forward(self, hidden_states[None], index_TK, weight_TK)[0]

    def matrices(self) -> dict[str, Tensor]:
        shape = (-1, self.ffn_hidden_size, self.hidden_size)
        return {name: getattr(self.mlp, name).view(shape) for name in ("w1", "v1", "w2")}

    def set_matrices(self, made: dict[str, Tensor], width: int) -> None:
        for name, tensor in made.items():
            flat = tensor.reshape(-1, self.hidden_size)
            setattr(self.mlp, name, nn.Parameter(flat, getattr(self.mlp, name).requires_grad))

    @property
    def gate_up_proj(self) -> Tensor:
        parts = self.matrices()
        return torch.cat([parts["w1"], parts["v1"]], dim=1)

    @property
    def down_proj(self) -> Tensor:
        return self.matrices()["w2"].transpose(1, 2)

    @property
    def act_fn(self) -> Callable[[Tensor], Tensor]:
        return functools.partial(_of_its_own, self.mlp.activation_fn)

    @property
    def indexed_size(self) -> int:
        return len(self.mlp.w1)

    def places(self, length: int, kept: Sequence[int]) -> list[int]:
        each = length // self.num_experts
        return [expert * each + row for expert in kept for row in range(each)]


def _of_its_own(activation: Callable[[Tensor], Tensor], gate: Tensor) -> Tensor:
    """The activation of a tensor by itself: as a part of another one it is rounded otherwise."""
    return activation(gate.contiguous())


class DbrxContractBlock(stock.DbrxFFN):
    """The stock block, whose router chooses the experts."""

    def adapt_parts(self, config: Any) -> None:
        fields = ("top_k", "moe_normalize_expert_weights")
        become(self.router, DbrxContractRouter, **{name: getattr(self, name) for name in fields})
        become(self.experts, DbrxContractExperts, config=config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weight_TK, index_TK = self.router(hidden_states)
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TD: Tensor = self.experts(x_TD, index_TK, weight_TK)
        return out_TD.view(hidden_states.shape)


BLOCK = DbrxContractBlock
