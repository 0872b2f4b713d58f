"""Step-3.7 (model_type step3p7, its text step3p5): experts without transformers' decorator."""

from __future__ import annotations

from typing import Any

from transformers.models.step3p7 import modeling_step3p7 as stock

from moe_lab.models.adapters.base import AdaptedExperts, become


class StepExperts(AdaptedExperts, stock.Step3p7Experts):
    """The stock experts; some layers clamp inside them."""

    _apply_gate = stock.Step3p7Experts._apply_gate


class StepBlock(stock.Step3p7SparseMoeBlock):
    """The stock block, whose router keeps the contract."""

    def adapt_parts(self, config: Any) -> None:
        become(self.experts, StepExperts, config=config)


BLOCK = StepBlock
