"""Agreement with the intact model, against models that are really pruned."""

from __future__ import annotations

import pytest
from edited_models import pruned_logits
from families import tiny_model

from moe_lab.profile.intact_predictions import IntactPredictions


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_agreement_is_that_with_the_pruned_model(family: str, batches: list) -> None:
    model = tiny_model(family)
    sample = IntactPredictions(model, batches)
    kept = {1: (0, 1, 4, 6), 3: (1, 3, 5, 7)}
    overlap, divergence, count = 0.0, 0.0, 0
    for batch in batches:
        rows = zip(
            pruned_logits(family, {}, batch), pruned_logits(family, kept, batch), strict=True
        )
        for intact, changed in rows:
            p, q = intact.softmax(0), changed.softmax(0)
            overlap += sum(min(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            divergence += float((p * (p / q).log()).sum())
            count += 1
    assert count == sample.num_positions == sum(int(b["attention_mask"].sum()) for b in batches)
    assert sample.acceptance(kept) == pytest.approx(overlap / count, rel=1e-5)
    assert sample.divergence(kept) == pytest.approx(divergence / count, rel=1e-4)
    assert sample.acceptance({}) == pytest.approx(1.0, abs=1e-6)
    assert sample.divergence({1: tuple(range(8))}) == pytest.approx(0.0, abs=1e-6)
