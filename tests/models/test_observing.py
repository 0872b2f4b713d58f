"""Observing a forward changes nothing."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, logits_of, tiny_batch, tiny_model
from host_reads import host_reads
from slow_router import observed

from moe_lab.models import observing
from moe_lab.models.layers import moe_layers
from moe_lab.profile.collect import collect_batch, collect_statistics, collecting

SENT = torch.arange(4).repeat_interleave(16)  # so many rows to each of four experts


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


@EACH_FAMILY
@pytest.mark.parametrize("at_once", [1, 1000])
def test_experts_computed_a_few_at_a_time_give_the_same(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and every sum of a profile; the logits to the bit, but for gpt_oss, whose products are
    over transposed weights. 1: one expert at a time."""
    model, batch = tiny_model(family), tiny_batch()
    model.set_experts_implementation("grouped_mm")
    found = []
    with torch.inference_mode():
        for number in (observing.REUSABLE_NUMBERS, at_once):
            monkeypatch.setattr(observing, "REUSABLE_NUMBERS", number)
            parts = list(observing._at_a_time(moe_layers(model)[0].experts, SENT, SENT.bincount()))
            assert (len(parts) > 1) is (number == at_once)
            logits = observed(model, batch)[0]
            found.append((logits, collect_statistics(model, [batch], neurons=True)))
    (logits, layers), (others, other_layers) = found
    exact = {} if family == "gpt_oss" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(others, logits, **({"rtol": 1e-5, "atol": 1e-5} | exact))
    for one, other in zip(layers, other_layers, strict=True):
        assert one.sums.keys() == other.sums.keys()
        for name, value in one.sums.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("only_routers", [False, True])
@pytest.mark.parametrize("experts", [4, 16])
def test_nobody_waits_for_a_gpu_in_a_pass_but_once_a_batch(
    experts: int, only_routers: bool
) -> None:
    """Neither each layer nor each expert: by grouped products, and where tokens are padding."""
    config = tiny_model("mixtral").config
    config.num_local_experts = experts
    model = type(tiny_model("mixtral"))(config).eval()
    model.set_experts_implementation("grouped_mm")
    batch = tiny_batch()
    assert not batch["attention_mask"].all()
    with torch.inference_mode(), host_reads() as read:
        model(**batch, use_cache=False, logits_to_keep=1)
    plain = read.by_operator
    with collecting(model, only_routers, neurons=not only_routers) as collection:
        collect_batch(collection, model, batch)  # the first one reads the weights
        with host_reads() as read:
            collect_batch(collection, model, batch)
    waited = read.by_operator - plain
    assert waited.total() <= 1, waited
