"""Observing a forward changes nothing."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, logits_of, tiny_batch, tiny_model
from slow_router import observed

from moe_lab.models.layers import moe_layers


@EACH_FAMILY
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_observing_changes_no_logit(family: str, implementation: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    model.set_experts_implementation(implementation)
    plain = logits_of(model, batch)
    logits, seen = observed(model, batch)
    if family == "gpt_oss" and implementation == "grouped_mm":
        # Its grouped product over transposed weights rounds otherwise than its own eager loop.
        torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits, plain)
    assert len(seen) == len(moe_layers(model))
    assert model.config._experts_implementation == implementation
    assert torch.equal(logits_of(model, batch), plain)
