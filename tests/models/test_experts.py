"""What one expert computes: the family's own loop over experts, one at a time."""

from __future__ import annotations

import torch
from families import EACH_FAMILY, tiny_model

from moe_lab.models.experts import expert_forward, expert_parameters
from moe_lab.models.layers import moe_layers


@EACH_FAMILY
def test_an_expert_alone_is_what_the_module_gives_where_all_tokens_go_to_it(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    layer = moe_layers(model)[0]
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for expert, parameters in enumerate(expert_parameters(layer.experts)):
        index = torch.full((5, 1), expert)
        expected = layer.experts(x_TD, index, torch.full((5, 1), 0.5)) / 0.5
        found = expert_forward(layer.experts, parameters, x_TD)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
