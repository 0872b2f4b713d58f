"""Distributions over the vocabulary, against plain sums."""

from __future__ import annotations

import math

import pytest
import torch
from families import tiny_batch, tiny_model
from torch import nn

from moe_lab.measure.speed import _StorageCounter
from moe_lab.models import predictions
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


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_loss_are_those_of_all_positions_at_once(
    dtype: torch.dtype, headed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they take beside the logits does not grow with the positions."""
    generator = torch.Generator().manual_seed(0)
    target_N = torch.randint(50, (60,), generator=generator)
    q = torch.randn(60, 50, generator=generator).to(dtype)
    head = nn.Linear(16, 50, dtype=dtype)
    states = torch.randn(60, 16, generator=generator).to(dtype)
    p = states if headed else torch.randn(60, 50, generator=generator).to(dtype)
    with torch.no_grad():
        logits = head(states) if headed else p
        log_p, log_q = (one.double().log_softmax(dim=-1) for one in (logits, q))
        monkeypatch.setattr(predictions, "VALUES_AT_ONCE", 4 * 50)
        with _StorageCounter([p, q, target_N, *head.parameters()]) as counter:
            before = counter.now
            divergence_N, loss_N = predictions.divergence_and_loss(
                p, head if headed else None, q, target_N
            )
    expected_N = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    close = 1e-6 if dtype == torch.float32 or not headed else 1e-2  # its products may round apart
    torch.testing.assert_close(divergence_N, expected_N, rtol=close, atol=close)
    expected_N = -log_q.gather(1, target_N[:, None])[:, 0]
    torch.testing.assert_close(loss_N, expected_N, rtol=1e-6, atol=1e-6)
    of_positions = 8 * 5 * len(target_N)
    assert counter.peak - before <= of_positions + 4 * (8 * 4 * 50)
    assert counter.peak - before < 4 * logits.numel()
    same, _ = predictions.divergence_and_loss(None, None, q, target_N)
    assert not same.any()
