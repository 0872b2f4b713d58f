"""Log-likelihoods of continuations: what prompts share is computed once, and only wanted logits.

Of a multiple-choice item all answers stand behind one prompt. Where the model's cache takes several
tokens at a time the prompt goes through it once, and each answer goes on from there. Whether it
does is no matter of a family's name: it is tried on the longest text, whose answers then have to
have the values that whole texts give them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lab.evaluate.decoding.base import Decoder
from moe_lab.progress import progress

logger = logging.getLogger(__name__)
# Log-likelihood in nats; whether each of its tokens is the likeliest.
Likelihood = tuple[float, bool]
BATCH_TOKENS = 16384
# What families raise whose caches take no several tokens, or none at all.
REFUSALS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
WORTH = 8  # tokens of a prompt that are worth a pass of their own
CLOSE = 1e-5  # nats, or shares of more: sums in another order differ by less, states by more


@dataclass(frozen=True)
class Continuation:
    """A continuation: the token ids of its text but the last, and which its own are."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the continuation."""
        return self.inputs[: len(self.inputs) - len(self.targets) + 1]


class Continuations:
    """Scores of continuations by one decoder, in forwards of at most `batch_size` texts.

    Of prompts with all that stands behind each so many: together of at most `batch_tokens` tokens,
    which the cache holds, or of one prompt. softmax_dtype: of the probabilities, None for the
    logits' own.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        batch_tokens: int,
        softmax_dtype: torch.dtype | None = None,
    ):
        self.decoder, self.batch_size, self.batch_tokens = decoder, batch_size, batch_tokens
        self.softmax_dtype = softmax_dtype
        exact = torch.finfo(decoder.model.dtype).bits >= 32  # half precision rounds each way apart
        self._shares: bool | None = None if exact and decoder.shares_prompts else False

    @torch.no_grad()
    def scores(self, asked: Sequence[Continuation]) -> list[Likelihood]:
        """Of each of `asked`, in order."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for place, one in enumerate(asked):
            by_prompt.setdefault(one.prompt, []).append(place)
        shared = [
            places
            for prompt, places in by_prompt.items()
            if self._shares is not False and len(places) > 1 and len(prompt) > WORTH
        ]
        shared.sort(key=lambda places: -len(asked[places[0]].prompt))
        found: dict[int, Likelihood] = {}
        if shared and self._shares is None:
            places = max(shared, key=lambda places: len(asked[places[0]].inputs))
            shared.remove(places)
            found |= zip(places, self._tried([asked[place] for place in places]), strict=True)
        behind = list(self._batches(asked, shared if self._shares else []))
        known = found.keys() | {place for places in behind for place in places}
        rest = [place for place in range(len(asked)) if place not in known]
        rest.sort(key=lambda place: -len(asked[place].inputs))
        whole = [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]
        ways = [(self._behind_prompts, one) for one in behind]
        ways += [(self._whole, one) for one in whole]
        for score, places in progress(ways, "evaluate: tasks"):
            found |= zip(places, score([asked[place] for place in places]), strict=True)
        return [found[place] for place in range(len(asked))]

    def _batches(
        self, asked: Sequence[Continuation], shared: Iterable[list[int]]
    ) -> Iterator[list[int]]:
        """The places of whole prompts together, as many as fit."""
        batch: list[int] = []
        prompts = 0
        for places in shared:
            joined = batch + places
            longest = max(len(asked[place].inputs) for place in joined)
            fits = len(joined) * longest <= self.batch_tokens and prompts < self.batch_size
            if batch and not fits:
                yield batch
                joined, prompts = places, 0
            batch, prompts = joined, prompts + 1
        if batch:
            yield batch

    def _tried(self, asked: Sequence[Continuation]) -> list[Likelihood]:
        """Scores of whole texts; whether prompts can be shared is known then."""
        whole = self._whole(asked)
        try:
            behind = self._behind_prompts(asked)
        except REFUSALS as error:
            logger.debug("prompts are not shared: %s", error)
            self._shares = False
        else:
            self._shares = all(
                abs(one[0] - other[0]) <= CLOSE * max(1.0, abs(one[0]))
                for one, other in zip(whole, behind, strict=True)
            )
        return whole

    def _whole(self, asked: Sequence[Continuation]) -> list[Likelihood]:
        return self._scored(asked, 0, None)

    def _behind_prompts(self, asked: Sequence[Continuation]) -> list[Likelihood]:
        """The same, by way of the model's cache, of which no position is padding."""
        prompts = list(dict.fromkeys(one.prompt for one in asked))
        number = min(map(len, prompts)) - 1  # the last token gives the first logits
        cache = self.decoder.cache(self._tensor([prompt[:number] for prompt in prompts]))
        rows = [prompts.index(one.prompt) for one in asked]
        cache.reorder_cache(torch.tensor(rows, device=self.decoder.model.device))
        return self._scored(asked, number, cache)

    def _scored(self, asked: Sequence[Continuation], first: int, cache: object) -> list[Likelihood]:
        """From the position `first` on, which the cache reaches to."""
        ids_BL = self._tensor([one.inputs[first:] for one in asked])
        chosen_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
        for row, one in enumerate(asked):
            end = len(one.inputs) - first
            chosen_BL[row, end - len(one.targets) : end] = True
        logits_NV = self.decoder.logits(ids_BL, chosen_BL.to(ids_BL.device), cache)
        log_p_NV = logits_NV.log_softmax(dim=-1, dtype=self.softmax_dtype)
        targets_N = torch.tensor(
            [token for one in asked for token in one.targets], device=log_p_NV.device
        )
        own_N = log_p_NV.gather(1, targets_N[:, None])[:, 0]
        likeliest_N = log_p_NV.argmax(dim=-1) == targets_N
        lengths = [len(one.targets) for one in asked]
        sums = torch.stack([part.sum() for part in own_N.split(lengths)])
        all_are = torch.stack([part.all() for part in likeliest_N.split(lengths)])
        return list(zip(sums.tolist(), all_are.tolist(), strict=True))

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of token ids, filled on the right, where no row looks."""
        longest = max(map(len, rows))
        filled = [[*row, *[0] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, device=self.decoder.model.device)
