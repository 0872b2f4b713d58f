"""Llama 4: the router's weight w multiplies what an expert gets: it adds E(w x), not w E(x).

`Routing.weight_TK` is w as everywhere; the pairs behind it have the outputs E(w x), with weight 1,
so that a weight times an output is what is added, as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama4 import modeling_llama4 as stock

from moe_lab.models.adapters.base import AdaptedExperts, become


class Llama4ContractRouter(nn.Linear):
    """The stock choice. No stock router any more: transformers would record the wrong output."""

    top_k: int

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = super().forward(hidden_states)
        top_TK, index_TK = torch.topk(logits_TE, self.top_k, dim=1)
        return logits_TE, top_TK.float().sigmoid().to(top_TK.dtype), index_TK


class Llama4ContractExperts(AdaptedExperts, stock.Llama4TextExperts):
    """The stock experts on the tokens that were sent to them; stock runs all experts on all."""

    is_transposed = True
    scales_input = True

    def alone(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_states)
        for expert in index_TK.unique().tolist():
            if expert >= self.num_experts:  # a stand-in's row
                continue
            token_S, rank_S = torch.where(index_TK == expert)
            x_SD = hidden_states[token_S] * weight_TK[token_S, rank_S, None]
            gate, up = (x_SD @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            out_TD.index_add_(0, token_S, (up * self.act_fn(gate)) @ self.down_proj[expert])
        return out_TD


class Llama4ContractBlock(stock.Llama4TextMoe):
    """The stock block, whose experts are told which tokens are theirs."""

    def adapt_parts(self, config: Any) -> None:
        become(self.router, Llama4ContractRouter)
        become(self.experts, Llama4ContractExperts, config=config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        logits_TE, weight_TK, index_TK = self.router(x_TD)
        out_TD = self.shared_expert(x_TD)
        out_TD.add_(self.experts(x_TD, index_TK, weight_TK))
        return out_TD, logits_TE


BLOCK = Llama4ContractBlock
