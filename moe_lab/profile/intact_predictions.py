"""How far a model without some of its experts agrees with the intact one, on a sample of text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe_lab.finite import check_number
from moe_lab.models.checkpoint import Model
from moe_lab.models.narrowing import Left, left_with
from moe_lab.models.opening import text_config
from moe_lab.models.predictions import divergence_terms, log_probabilities

logger = logging.getLogger(__name__)
POSITIONS_AT_ONCE = 1024


class IntactPredictions:
    """The intact model's next-token distributions, and others next to them.

    model: intact, and left so. batches: input_ids, attention_mask [B, L]. Its logits at every valid
    position are computed once and kept on the CPU in the model's dtype: positions x vocabulary
    values, exact. Teacher-forced: both models read the same text.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, batches: Sequence[dict[str, Tensor]]):
        self.model, self.batches = model, batches
        self.num_positions = sum(int(batch["attention_mask"].sum()) for batch in batches)
        size = self.num_positions * text_config(model.config).vocab_size
        logger.info(
            "the intact model's predictions at %d positions take %.2f GiB of memory",
            self.num_positions, size * model.dtype.itemsize / 2**30,
        )  # fmt: skip
        self._logits = [self._valid_logits(batch).cpu() for batch in batches]

    def acceptance(self, kept: Mapping[int, Left]) -> float:
        """ESAP (2603.06003): the mean over positions of sum_v min(p(v), q(v)), in [0, 1].

        p: the intact model's next-token distribution, q: that of the model whose MoE layers have
        only the `kept` experts or hidden units, by layer index (`narrowing.left_with`). It is the
        expected rate at which p accepts what q proposes in speculative decoding.
        """
        return self._mean(kept, lambda p, q: torch.minimum(p.exp(), q.exp()).sum(dim=-1))

    def divergence(self, kept: Mapping[int, Left]) -> float:
        """The mean over positions of KL(p || q), in nats."""
        return self._mean(kept, lambda p, q: divergence_terms(p, q).sum(dim=-1))

    @torch.inference_mode()
    def _mean(
        self,
        kept: Mapping[int, Left],
        measure: Callable[[Tensor, Tensor], Tensor],
    ) -> float:
        """Of a measure of two distributions' logarithms [t, V], which gives a value a position."""
        total = 0.0
        with left_with(self.model, kept):
            for batch, intact in zip(self.batches, self._logits, strict=True):
                logits = self._valid_logits(batch)
                parts = (logits.split(POSITIONS_AT_ONCE), intact.split(POSITIONS_AT_ONCE))
                for ours, theirs in zip(*parts, strict=True):
                    p, q = log_probabilities(theirs.to(ours.device)), log_probabilities(ours)
                    total += float(measure(p, q).sum(dtype=torch.float64))
        check_number(total, "how far the model's predictions without some experts are from its own")
        return total / self.num_positions

    def _valid_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """[T, V]."""
        logits: Tensor = self.model(**batch, use_cache=False).logits
        return logits[batch["attention_mask"].bool()]
