"""JetMoE: its block sorts the tokens by expert itself, and adds a bias to what the experts give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.jetmoe import modeling_jetmoe as stock

from moe_lab.models.adapters.base import AdaptedExperts, become


class JetMoeRouter(stock.JetMoeTopKGating):
    """The stock choice. The fifth of what it returns is where transformers records the logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, None, Tensor]:
        logits_TE = self.layer(hidden_states).float()
        top_TK, index_TK = logits_TE.topk(self.top_k, dim=1)
        return logits_TE, top_TK.softmax(dim=1).type_as(hidden_states), index_TK, None, logits_TE


class JetMoeExperts(AdaptedExperts):
    """The two linear modules of a block, which it uses but does not own: no parameter moves."""

    # The experts of its attention stay; one number of the config counts both kinds.
    keeps_top_k = "by its config jetmoe's attention would get as many experts for each token"
    obstacle = "its block adds a bias to what its experts give"

    def __init__(self, block: stock.JetMoeMoE, config: Any):
        super().__init__()
        self.config, self.act_fn = config, block.activation
        self.linears = block.input_linear, block.output_linear  # a tuple is not registered

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        yield from (self, *self.linears)

    @property
    def num_experts(self) -> int:
        return len(self.gate_up_proj)

    @property
    def gate_up_proj(self) -> Tensor:
        return self.linears[0].weight

    @property
    def down_proj(self) -> Tensor:
        return self.linears[1].weight

    def set_matrices(self, made: dict[str, Tensor], width: int) -> None:
        for linear, tensor in zip(self.linears, made.values(), strict=True):
            linear.weight = nn.Parameter(tensor, linear.weight.requires_grad)
            _, linear.output_size, linear.input_size = tensor.shape

    def alone(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        counts = torch.bincount(index_TK.flatten(), minlength=self.num_experts).tolist()
        order_S = index_TK.flatten().sort(0)[1]
        token_S = order_S.div(index_TK.shape[1], rounding_mode="trunc")
        gate, up = self.linears[0](hidden_states[token_S], counts).chunk(2, dim=-1)
        y_SD = self.linears[1](self.act_fn(gate) * up, counts)
        y_SD = y_SD * weight_TK.flatten()[order_S][:, None]
        return torch.zeros_like(hidden_states).index_add(0, token_S, y_SD)


class JetMoeBlock(stock.JetMoeMoE):
    """The stock block, with an experts module that computes what it did itself."""

    def adapt_parts(self, config: Any) -> None:
        become(self.router, JetMoeRouter)
        self.experts = JetMoeExperts(self, config)

    def forward(self, layer_input: Tensor) -> Tensor:
        x_TD = layer_input.reshape(-1, layer_input.shape[-1])
        _, weight_TK, index_TK, *_ = self.router(x_TD)
        out_TD: Tensor = self.experts(x_TD, index_TK, weight_TK)
        return out_TD.view(layer_input.shape) + self.bias


BLOCK = JetMoeBlock
