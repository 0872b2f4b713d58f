"""Router rows that stay while their experts are gone: which lead to stand-ins, or share an expert.

The family's own router chooses among all rows, with all their weights; then rows become positions
of experts. A stand-in's share is added to what the kernel makes of the experts, which are the only
ones that it holds. Letters: T tokens, K chosen per token, E router rows, R stand-ins, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from moe_lab_vllm.form import Layer


class PlacingRouter(BaseRouter):
    """Routes over all rows by the family's own router, and gives positions of experts.

    What a stand-in was given has position 0 and weight 0 there; `share_TR` or `copied_T1` has its
    weight.
    """

    def __init__(self, of_rows: BaseRouter, experts: PlacedExperts) -> None:
        super().__init__(top_k=of_rows.top_k, global_num_experts=experts.num_experts)
        self.of_rows = of_rows
        self.experts = (experts,)  # in a tuple, since the experts hold this router

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.Unspecified

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        (experts,) = self.experts
        weight_TK, row_TK = self.of_rows._compute_routing(
            hidden_states, router_logits, indices_type, input_ids=input_ids
        )
        place_TK = experts.place_E[row_TK.long()]
        gone_TK = place_TK >= experts.num_experts
        experts.added = experts.of_stand_ins(hidden_states, place_TK, weight_TK * gone_TK)
        placed_TK = place_TK.masked_fill(gone_TK, 0).to(row_TK.dtype)
        return weight_TK.masked_fill(gone_TK, 0.0), placed_TK


class PlacedExperts(MoERunner):
    """An experts module of vLLM's with more router rows than experts; made by `keep_rows`.

    place_E: for each row the position of its expert; num_experts + r for stand-in r. constants:
    [R, D] where the stand-ins are constants. added: what the stand-ins gave to the tokens at hand.
    """

    num_experts: int
    num_stand_ins: int
    stand_in: str | None
    place_E: nn.Parameter
    constants: nn.Parameter | None
    added: Tensor | None

    def of_stand_ins(self, x_TD: Tensor, place_TK: Tensor, weight_TK: Tensor) -> Tensor | None:
        """Their weighted sum in float32; weight_TK: 0 where an expert was chosen."""
        if self.stand_in == "copy":
            return weight_TK.sum(dim=1, keepdim=True) * x_TD
        if self.constants is None:
            return None
        r_TK = (place_TK - self.num_experts).clamp(min=0)
        weight_TR = weight_TK.new_zeros(len(weight_TK), self.num_stand_ins)
        weight_TR = weight_TR.scatter_add(1, r_TK, weight_TK)
        return weight_TR @ self.constants.to(weight_TR.dtype)

    def _apply_quant_method(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Any]:
        """The experts' sum with that of the stand-ins, which one of the ranks to be summed adds."""
        shared, out = super()._apply_quant_method(*args, **kwargs)
        added, self.added = self.added, None
        if added is not None and (
            self._fused_output_is_reduced or get_tensor_model_parallel_rank() == 0
        ):
            assert isinstance(out, Tensor)  # `_check` has seen to it
            out = out + added.to(out.dtype)
        return shared, out

    def check_places(self) -> None:
        """ValueError where a row leads to nothing."""
        last = int(self.place_E.max())
        ends = self.num_experts + self.num_stand_ins
        if int(self.place_E.min()) < 0 or last >= ends:
            raise ValueError(
                f"{self.layer_name}.place_E leads to {last}, and there are {ends} places: "
                f"{self.num_experts} experts, {self.num_stand_ins} stand-ins"
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Take out what is ours; the rest goes the stock way."""
        ours = dict(self.named_parameters(recurse=False))
        loaded = []

        def stock() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in ours:
                    ours[name].data.copy_(tensor)
                    loaded.append(name)
                else:
                    yield name, tensor

        yield from super().load_weights(stock())
        yield from loaded


def keep_rows(block: Any, layer: Layer) -> None:
    """Give a family's block, built with the experts that exist, all its router rows, in place."""
    runner, gate, rows = block.experts, block.gate, layer.rows
    assert rows is not None
    _check(runner)
    wider = GateLinear(
        gate.input_size,
        rows,
        out_dtype=gate.out_dtype,
        params_dtype=gate.weight.dtype,
        prefix=gate.prefix,
    )
    if (bias := getattr(gate, "e_score_correction_bias", None)) is not None:
        wider.e_score_correction_bias = nn.Parameter(bias.new_empty(rows), requires_grad=False)
        runner.router.e_score_correction_bias = wider.e_score_correction_bias
        runner.routed_experts.e_score_correction_bias = wider.e_score_correction_bias
    block.gate = wider
    if runner.gate is not None:
        runner.gate = wider

    runner.__class__ = PlacedExperts
    runner.num_experts, runner.num_stand_ins = layer.num_experts, layer.num_stand_ins
    runner.stand_in = layer.stand_in
    runner.place_E = nn.Parameter(torch.empty(rows, dtype=torch.int64), requires_grad=False)
    runner.constants = None
    if layer.stand_in == "constant":
        constants = torch.empty(layer.num_stand_ins, gate.input_size)
        runner.constants = nn.Parameter(constants, requires_grad=False)
    runner.added = None
    runner.router.global_num_experts = rows
    runner.router = PlacingRouter(runner.router, runner)


def _check(runner: MoERunner) -> None:
    """Refuse the ways to run experts in which the router's choice is not ours to change."""
    parallel = runner.moe_config.moe_parallel_config
    if runner.is_monolithic:
        raise ValueError(
            f"{runner.layer_name} keeps router rows without experts, and vLLM has chosen a kernel "
            "that routes by itself: ask for another with --moe-backend triton"
        )
    if parallel.dp_size > 1 or parallel.pcp_size > 1 or parallel.is_sequence_parallel:
        raise ValueError(
            f"{runner.layer_name} keeps router rows without experts, which moe_lab_vllm serves "
            "with tensor, expert and pipeline parallelism, not with data parallelism"
        )
