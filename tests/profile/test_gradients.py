"""Sums over gradients at hidden units, whatever the batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from expert_sets import Case
from neuron_pairs import profile_of

from moe_lab.models.backward import LossLabels
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.gradients import NeuronGradients, neuron_gradients
from moe_lab.profile.profile import Profile
from moe_lab.types import UserError

NAMES = [one.name for one in dataclasses.fields(NeuronGradients)]


def one_by_one(case: Case) -> Profile:
    """A profile of the same samples, each a batch of its own without padding, last ones first."""
    samples = []
    for batch in case.batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            samples.append({"input_ids": ids[None, :length], "attention_mask": mask[None, :length]})
    positions = list(range(len(samples)))[::-1]
    return Profile(
        case.statistics, lambda number=None: LayerStream(case.model, samples[::-1], None, positions)
    )


@pytest.mark.parametrize("labels", [LossLabels(), LossLabels("sampled", samples=3, seed=2)])
def test_padding_and_batches_change_nothing(labels: LossLabels) -> None:
    case = Case("mixtral")
    found = neuron_gradients(profile_of(case), labels, None)
    others = neuron_gradients(one_by_one(case), labels, None)
    for layer, one, other in zip(case.statistics, found, others, strict=True):
        assert torch.equal(one.count, layer["count"])
        for name in NAMES:
            value, expected = getattr(one, name), getattr(other, name)
            assert value.dtype == torch.float64 and value.abs().max() > 0
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9 * float(value.max()))


def test_several_losses_are_a_mean() -> None:
    """With labels that are sure, draws are the same loss as one."""
    case = Case("mixtral")
    case.model.lm_head.weight.data.mul_(1e4)
    once, often = (
        neuron_gradients(profile_of(case), LossLabels("sampled", samples=number), None)[0]
        for number in (1, 3)
    )
    for name in NAMES:
        torch.testing.assert_close(getattr(once, name), getattr(often, name), rtol=1e-9, atol=0)


def test_a_norm_behind_experts_is_refused() -> None:
    case = Case("mixtral")
    experts = moe_layers(case.model)[2].experts
    experts.has_post_expert_norm, experts.post_expert_norm = True, torch.nn.Identity()
    with pytest.raises(UserError, match="layer 2: a norm stands behind each expert"):
        neuron_gradients(profile_of(case), LossLabels(), None)
