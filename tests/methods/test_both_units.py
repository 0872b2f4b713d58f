"""Plans in which experts and hidden units go under one budget."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from slow_neurons import profile_of

from moe_lab.methods.both_units import BothUnits
from moe_lab.methods.metrics.base import as_metric
from moe_lab.methods.metrics.energy import energy
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.sensitivity import Sensitivity
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.models.edits.plan import apply_plan, check_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.narrowing import Cut, left_with
from moe_lab.models.rounding import Scheme, dequantised, rounded
from moe_lab.types import UserError


def both(**more: Any) -> Prune:
    options = {"metric": energy, "ratio": Sensitivity(0.4, num_samples=3), "unit": "both"} | more
    return Prune(**options)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_plan_is_within_its_bytes_and_does_what_was_measured(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    profile = profile_of(model, [batch])
    infos = [layer.info for layer in profile.statistics]
    method = both()
    method.check(infos)
    plan = method.plan(profile)
    check_plan(infos, plan.edited())
    changed = copy.deepcopy(model)
    apply_plan(changed, plan)
    before = sum(p.numel() for p in model.parameters())
    gone = before - sum(p.numel() for p in changed.parameters())
    experts = sum(info.num_experts * info.expert_parameters for info in infos)
    assert gone >= 0.4 * experts - 1
    # Bytes count a router's bias, too, which is no parameter.
    assert plan.notes["given"]["ratio"] == pytest.approx(gone / experts, rel=1e-3)
    for layer in moe_layers(changed):
        number, width = plan.notes["kept_per_layer"][str(layer.info.index)].split(" x ")
        assert (layer.info.num_experts, layer.info.expert_width) == (int(number), int(width))
    cuts = {}
    for chain in plan.chains():
        kept = chain.experts_kept or tuple(range(8))
        neurons = torch.ones(8, 16, dtype=torch.bool)
        if f"layers.{chain.index}.neurons" in plan.tensors:
            neurons[list(kept)] = plan.tensors[f"layers.{chain.index}.neurons"].bool()
        cuts[chain.index] = Cut(kept, neurons)
    with left_with(model, cuts):
        expected = logits_of(model, batch)
    torch.testing.assert_close(logits_of(changed, batch), expected, rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_the_model_with_one_layer_cut() -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    profile = profile_of(model, [batch])
    plan = BothUnits(as_metric(energy), Sensitivity(0.4, num_samples=3)).plan(profile)
    score = energy(profile.statistics[1])
    experts = tuple(sorted(score.sum(dim=1).argsort(descending=True)[:4].tolist()))
    neurons = torch.stack([row >= row.sort().values[16 - 10] for row in score])
    valid = batch["attention_mask"].bool()
    p = logits_of(model, batch)[valid].double().log_softmax(-1)
    with left_with(model, {1: Cut(experts, neurons)}):
        q = logits_of(model, batch)[valid].double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert plan.notes["errors"]["1"]["4x10"] == pytest.approx(expected, rel=1e-3)


def test_bits_are_measured_and_chosen_with_experts_and_units() -> None:
    model, batch = tiny_model("mixtral"), tiny_batch()
    profile = profile_of(model, [batch])
    ratio = Sensitivity(0.8, num_samples=3, round_to=8, bits=[4, 2, 16], group_size=8)
    infos = [layer.info for layer in profile.statistics]
    method = both(ratio=ratio)
    method.check(infos)
    plan = method.plan(profile)
    check_plan(infos, plan.edited())
    assert plan.notes["given"]["ratio"] >= 0.8
    bits = plan.notes["quantize"]["bits"]
    assert bits.keys() == {"0", "1", "2", "3"} and set(bits.values()) <= {2, 4, 16}
    valid = batch["attention_mask"].bool()
    p = logits_of(model, batch)[valid].double().log_softmax(-1)
    rounded_model = copy.deepcopy(model)
    for name, tensor in rounded_model.named_parameters():
        if name.startswith("model.layers.1.mlp.experts"):
            read = [dequantised(rounded(one.detach(), Scheme(4, 8))) for one in tensor]
            tensor.data.copy_(torch.stack(read))
    q = logits_of(rounded_model, batch)[valid].double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert plan.notes["errors"]["1"]["8x16x4"] == pytest.approx(expected, rel=1e-3)


def test_other_ratios_and_options_of_one_unit_are_refused() -> None:
    infos = [one.info for one in moe_layers(tiny_model("mixtral"))]
    for options, words in (
        ({"ratio": Uniform(0.4)}, "ratio=sensitivity"),
        ({"ratio": Sensitivity(0.4, error="output")}, "ratio.error=kl"),
        ({"ratio": Sensitivity(0.99)}, "too much.*stay"),
        ({"ratio": Sensitivity(0.99, bits=[2])}, "in the fewest bits"),
        ({"ratio": Sensitivity(0.4, bits=[9])}, r"ratio.bits=\[9\]"),
        ({"ratio": Sensitivity(0.4, bits=[4], group_size=7)}, "ratio.group_size=7"),
        ({"widths": "by_expert"}, "method.widths=by_expert is not possible"),
        ({"propagate": True}, "method.propagate=true is not possible"),
    ):
        with pytest.raises(UserError, match=words):
            both(**options).check(infos)
