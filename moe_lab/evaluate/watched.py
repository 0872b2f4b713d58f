"""lm-eval's model in this process, whose predictions have to be numbers.

With NaN every multiple-choice task picks its first answer and every generation its first token: the
accuracy would be one that no model has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from moe_lab import processes
from moe_lab.evaluate.continuations import BATCH_TOKENS, Continuation, Continuations
from moe_lab.evaluate.decoding.base import Decoder
from moe_lab.finite import number_word
from moe_lab.types import NotFinite


class WatchedLM(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """Refuses what is not finite: NotFinite names the task and its document.

    decoder: how the model's text is decoded, and of which logits log-likelihoods are.

    Several processes answer a share of the requests each, and have all answers; lm-eval's own way
    pads their shares and has the figures in one process alone.
    """

    def __init__(self, decoder: Decoder, batch_tokens: int = BATCH_TOKENS, **options: Any):
        super().__init__(pretrained=decoder.model, **options)
        self.decoder, self.batch_tokens = decoder, batch_tokens
        self._encoded: dict[tuple[object, ...], list[int]] = {}

    def tok_encode(self, string: str, *arguments: Any, **named: Any) -> list[int]:
        """Token ids; a prompt with several answers is encoded once."""
        key = (string, *arguments, *sorted(named.items()))
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, *arguments, **named)
        return self._encoded[key]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], **options: Any
    ) -> list[tuple[float, bool]]:
        """lm-eval's sums over continuations, of (request, prompt's ids, continuation's ids)."""
        asked = []
        for _, prompt, continuation in requests:
            ids = (*prompt, *continuation)[-(self.max_length + 1) :]
            asked.append(Continuation(ids[:-1], tuple(continuation)))
        found = Continuations(self.decoder, self.batch_size, self.batch_tokens, self.softmax_dtype)
        return found.scores(asked)

    def _model_generate(self, *arguments: Any, **named: Any) -> Tensor:
        """Token ids, prompts included."""
        ids: Tensor = super()._model_generate(
            *arguments, **named, custom_generate=self.decoder.loop
        )
        return ids

    def loglikelihood(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        """The log-likelihoods of continuations."""
        mine = processes.share(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(mine, **options)
        _check(mine, [one[0] for one in found])
        return processes.join(found)

    def loglikelihood_rolling(self, requests: Sequence[Any], **options: Any) -> list[float]:
        """The log-likelihoods of whole texts."""
        mine = processes.share(requests)
        found: list[float] = super().loglikelihood_rolling(mine, **options)
        _check(mine, found)
        return processes.join(found)

    def generate_until(self, requests: Sequence[Any], **options: Any) -> list[str]:
        """Texts that continue prompts, each token from logits that are looked at."""
        mine = processes.share(requests)
        tasks = ", ".join(dict.fromkeys(str(one.task_name) for one in mine))
        with _finite_logits(self.model, tasks):
            found: list[str] = super().generate_until(mine, **options)
        return processes.join(found)


def _check(requests: Sequence[Any], values: Sequence[float]) -> None:
    for one, value in zip(requests, values, strict=True):
        if not math.isfinite(value):
            raise NotFinite(
                f"task {one.task_name}, document {one.doc_id}: the log-likelihood is "
                f"{number_word(value)}"
            )


@contextmanager
def _finite_logits(model: nn.Module, tasks: str) -> Iterator[None]:
    """While open, each forward's last logits are looked at: their largest is NaN where one is."""

    def look(module: nn.Module, args: object, output: Any) -> None:
        if not bool(output.logits[:, -1].amax(dim=-1).isfinite().all()):
            raise NotFinite(f"task {tasks}: the logits of a generated token are not finite")

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
