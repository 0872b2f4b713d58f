"""What a model predicts: distributions over the vocabulary, and how far apart two of them are.

Letters beside those of types.py: N positions, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def exact(values: Tensor) -> Tensor:
    """Logits or states in float32 or better, in which distributions and errors are computed."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def next_token_logits(model: Any, inputs: Mapping[str, Tensor], chosen_BL: Tensor) -> Tensor:
    """The logits [N, V] of the positions that `chosen_BL` marks, of all but the last [B, L - 1].

    inputs: input_ids and attention_mask [B, L].
    """
    logits: Tensor = model(**inputs, use_cache=False).logits[:, :-1]
    return logits[chosen_BL]


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """log p [N, V], in float32 or better."""
    return exact(logits_NV).log_softmax(dim=-1)


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) for each class [N, V]: their sum over classes is KL(p || q), in nats."""
    return log_p.exp() * (log_p - log_q)
