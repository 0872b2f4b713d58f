"""LongCat-Flash: behind the rows of its experts the router has rows of zero experts, which copy.

Zero experts have no weights and are never removed: `num_experts` counts the others, the router's
rows are of both. The classifier, its bias and, without use, gate_up_proj have E + Z rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.models.longcat_flash import modeling_longcat_flash as stock

from moe_lab.models.adapters.base import AdaptedExperts, become


class LongcatRouter(stock.LongcatFlashTopkRouter):
    """The stock router, which counts its rows."""

    @property
    def n_routed_experts(self) -> int:
        return len(self.classifier.weight)


class LongcatExperts(AdaptedExperts, stock.LongcatFlashExperts):
    """The stock experts. zeros: Z, under a name that no number of experts has."""

    zeros: int

    obstacle = "some of its router's rows copy what the block gets"

    @property
    def num_experts(self) -> int:
        return len(self.down_proj)

    num_routed_experts = num_experts

    @property
    def indexed_size(self) -> int:
        return len(self.gate_up_proj)

    total_experts = indexed_size

    @property
    def zero_experts(self) -> int:
        return self.zeros

    def places(self, length: int, kept: Sequence[int]) -> list[int]:
        return [*kept, *range(self.num_experts, length)]

    def matrices(self) -> dict[str, Tensor]:
        return {"gate_up_proj": self.gate_up_proj[: self.num_experts], "down_proj": self.down_proj}

    def set_matrices(self, made: dict[str, Tensor], width: int) -> None:
        whole = pad(made["gate_up_proj"], (0, 0, 0, 0, 0, self.zeros))
        super().set_matrices(made | {"gate_up_proj": whole}, width)

    def forward(self, hidden_states: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if index_TK.shape[1] == 1 and not self.is_ours():  # the stock code needs two columns
            index_TK, weight_TK = index_TK.expand(-1, 2), pad(weight_TK, (0, 1))
        out_TD = super().forward(hidden_states, index_TK, weight_TK)
        if not self.is_ours():  # the stock code adds the copies itself
            return out_TD
        zero_S, order_S = index_TK.t().reshape(-1).sort(stable=True)
        order_S = order_S[zero_S >= self.num_experts]
        token_S, rank_S = order_S % len(index_TK), order_S // len(index_TK)
        copies_SD = hidden_states[token_S] * weight_TK[token_S, rank_S, None]
        return out_TD.index_add(0, token_S, copies_SD.to(out_TD.dtype))


class LongcatBlock(stock.LongcatFlashMoE):
    """The stock block."""

    def adapt_parts(self, config: Any) -> None:
        zeros = vars(self.experts).pop("zero_expert_num")
        del vars(self.router)["n_routed_experts"]  # now properties, that follow the tensors
        del vars(self.experts)["num_routed_experts"], vars(self.experts)["total_experts"]
        become(self.router, LongcatRouter)
        become(self.experts, LongcatExperts, config=config, zeros=zeros)


BLOCK = LongcatBlock
