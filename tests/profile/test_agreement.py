"""How experts turn their tokens, against a token at a time."""

from __future__ import annotations

import torch
from expert_sets import Case
from neuron_pairs import EACH_ROUTER, pairs_of, profile_of

from moe_lab.profile.agreement import agreements


@EACH_ROUTER
def test_turns_are_sums_over_tokens(family: str) -> None:
    case = Case(family)
    found = agreements(profile_of(case), None)
    pairs = pairs_of(case)
    for layer, one in zip(case.statistics, found, strict=True):
        expected_E = torch.zeros(layer.info.num_experts, dtype=torch.float64)
        for pair in pairs[layer.info.index]:
            x_D, f_D = pair.x_D, pair.f_D.detach()
            cosine = x_D @ f_D / (x_D.norm() * f_D.norm())
            expected_E[pair.expert] += pair.weight * f_D.norm() * (1 - cosine)
        assert torch.equal(one.count, layer["count"])
        exact = 100 * max(case.exact, 1e-9)
        torch.testing.assert_close(one.turn_sum, expected_E, rtol=exact, atol=exact)
        assert one.projection_sum.shape == (layer.info.num_experts, layer.info.expert_width)
