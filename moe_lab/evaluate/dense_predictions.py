"""What the dense model predicts on held-out text, kept until a variant is compared with it.

So that no device has to hold both models: of the dense one only its head stays, and the states that
go into it. Letters beside those of types.py: N the positions of a batch that predict a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lab import processes
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Model
from moe_lab.models.predictions import head_at, logits_at
from moe_lab.progress import progress

COMPARED = 64  # positions of a batch whose logits are computed, to be compared


def predicting(batch: dict[str, Tensor]) -> Tensor:
    """Where a token of a batch and its next one are data, [B, L] bool."""
    valid = batch["attention_mask"].bool()
    return valid & nn.functional.pad(valid[:, 1:], (0, 1))


class DensePredictions:
    """The dense model's logits on `batches` (input_ids, attention_mask [B, L]).

    kept: where states [N, D] go until they are asked for. The model itself stays where its logits
    are not what its head alone makes of them (a soft cap, a scale): that is tried on each batch.
    Several processes take every so-manieth batch each.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, batches: Sequence[dict[str, Tensor]], kept: Activations):
        self._kept, self._head = kept, model.get_output_embeddings()
        self._model: Model | None = None
        for number in progress(processes.share(range(len(batches))), "evaluate: the dense model"):
            if self._head is None or not self._keep(model, batches[number], number):
                self._model = model
                break

    def _keep(self, model: Model, batch: dict[str, Tensor], number: int) -> bool:
        """Keep what goes into the head at a batch, if the head makes the logits of it alone."""
        assert self._head is not None
        with head_at(model, predicting(batch), most=COMPARED) as taken:
            logits = model(**batch, use_cache=False).logits
        if len(taken) != 1:
            return False
        made = self._head(taken[0][:COMPARED][None])
        if not torch.equal(made.nan_to_num(), logits.nan_to_num()):
            return False
        self._kept[number] = taken[0]
        return True

    def logits(self, number: int, batch: dict[str, Tensor]) -> tuple[Tensor, nn.Module | None]:
        """Of a batch what goes into the head [N, D], and the head; or the logits, and None."""
        if self._model is not None:
            return logits_at(self._model, predicting(batch), **batch, use_cache=False), None
        return self._kept[number], self._head
