"""What a model predicts: distributions over the vocabulary, and how far apart two of them are.

Letters beside those of types.py: N positions, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

VALUES_AT_ONCE = 2**22  # of positions times the vocabulary: five copies in float32 are 80 MiB


def exact(values: Tensor) -> Tensor:
    """Logits or states in float32 or better, in which distributions and errors are computed."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def next_token_logits(model: Any, inputs: Mapping[str, Tensor], chosen_BL: Tensor) -> Tensor:
    """The logits [N, V] of the positions that `chosen_BL` marks, of all but the last [B, L - 1].

    inputs: input_ids and attention_mask [B, L].
    """
    return logits_at(model, nn.functional.pad(chosen_BL, (0, 1)), **inputs, use_cache=False)


def logits_at(model: Any, chosen_BL: Tensor, **inputs: Any) -> Tensor:
    """The logits [N, V] of the positions that `chosen_BL` marks; inputs: of the forward pass."""
    with head_at(model, chosen_BL):
        logits: Tensor = model(**inputs).logits
    return logits[chosen_BL] if logits.shape[:2] == chosen_BL.shape else logits[0]


@contextmanager
def head_at(model: Any, chosen_BL: Tensor, most: int | None = None) -> Iterator[list[Tensor]]:
    """While open, the model's head gets the chosen states alone, as one text [1, N, D].

    Gives the list of all that were chosen [N, D], of each forward pass; most: of which so many go
    into the head. A head that would get other states than those of all [B, L] positions gets them
    as ever.
    """
    chosen: list[Tensor] = []

    def choose(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        states, *rest = args
        if states.shape[:2] != chosen_BL.shape:
            return None
        chosen.append(states[chosen_BL])
        return (chosen[-1][:most][None], *rest)

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(choose)
    try:
        yield chosen
    finally:
        if handle is not None:
            handle.remove()


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """log p [N, V], in float32 or better."""
    return exact(logits_NV).log_softmax(dim=-1)


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) for each class [N, V]: their sum over classes is KL(p || q), in nats."""
    return log_p.exp() * (log_p - log_q)


def divergence_and_loss(
    p_ND: Tensor | None, head: nn.Module | None, q_logits_NV: Tensor, target_N: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p || q) and -log q(target) at N positions, [N] float64.

    p_ND: what `head` makes p's logits of; these themselves without a head; None where p is q. A few
    positions at a time: beside these it takes some `VALUES_AT_ONCE` in float32, however many
    positions and tokens there are.
    """
    divergence, loss = ([target_N.new_zeros(0, dtype=torch.float64)] for _ in range(2))
    rows = max(1, VALUES_AT_ONCE // q_logits_NV.shape[-1])
    for start in range(0, len(target_N), rows):
        few = slice(start, start + rows)
        log_q = log_probabilities(q_logits_NV[few])
        log_p = log_q
        if p_ND is not None:
            log_p = log_probabilities(p_ND[few] if head is None else head(p_ND[few]))
        loss.append(-log_q.gather(1, target_N[few][:, None])[:, 0].double())
        divergence.append(divergence_terms(log_p, log_q).sum(dim=-1, dtype=torch.float64))
    return torch.cat(divergence), torch.cat(loss)
