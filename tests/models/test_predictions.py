"""Distributions over the vocabulary, against plain sums."""

from __future__ import annotations

import math

import pytest
import torch
from families import tiny_batch, tiny_model

from moe_lab.models.predictions import (
    divergence_terms,
    exact,
    log_probabilities,
    next_token_logits,
)

P = [0.5, 0.25, 0.125, 0.125]
Q = [0.1, 0.2, 0.3, 0.4]


def test_the_divergence_is_that_of_its_definition() -> None:
    log_p, log_q = (torch.tensor([row]).double().log() for row in (P, Q))
    expected = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    assert float(divergence_terms(log_p, log_q).sum()) == pytest.approx(expected)
    assert float(divergence_terms(log_p, log_p).abs().sum()) == 0
    other = sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))
    assert float(divergence_terms(log_q, log_p).sum()) == pytest.approx(other) != expected


def test_distributions_are_computed_in_float32_or_better() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 20
    assert log_probabilities(logits.bfloat16()).dtype == torch.float32
    assert log_probabilities(logits.double()).dtype == exact(logits.double()).dtype == torch.float64
    for row, logs in zip(logits.tolist(), log_probabilities(logits).tolist(), strict=True):
        total = math.log(sum(math.exp(one - max(row)) for one in row)) + max(row)
        assert logs == pytest.approx([one - total for one in row], abs=1e-4)


def test_the_chosen_positions_have_a_next_token() -> None:
    model, batch = tiny_model("qwen2_moe"), tiny_batch()
    chosen = batch["attention_mask"][:, 1:].bool()
    with torch.inference_mode():
        found = next_token_logits(model, batch, chosen)
        whole = model(**batch).logits
    rows = [whole[b, t] for b, t in chosen.nonzero().tolist()]
    assert torch.equal(found, torch.stack(rows))
