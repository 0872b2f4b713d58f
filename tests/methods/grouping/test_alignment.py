"""Hidden units matched by what they compute, against all permutations."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import tiny_batch, tiny_model
from torch import Tensor

from moe_lab.methods.grouping.alignment import permutation
from moe_lab.models.experts import expert_hidden, expert_parameters
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.all_experts import ExpertSample


@pytest.mark.parametrize("align", ["activations", "both"])
def test_permutations_equal_a_slow_reference(align: str) -> None:
    """The least sum of distances, over all orders of four hidden units."""
    model = tiny_model("mixtral", intermediate_size=4)
    layer = moe_layers(model)[0]
    units, parameters = HiddenUnits(layer.experts), expert_parameters(layer.experts)
    with ExpertSample(LayerStream(model, [tiny_batch()])).open(0) as experts:
        found = permutation(experts, [(2, 0, 7), (1, 4)], with_weights=align == "both")
        x_TD = torch.cat([chunk.x_TD for chunk in experts.chunks()])
    assert torch.equal(found[[1, 2, 3, 5, 6]], torch.arange(4).repeat(5, 1))

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True)

    with torch.no_grad():
        hidden = [unit(expert_hidden(layer.experts, one, x_TD).T) for one in parameters]
        weights = [unit(units.weights(expert)) for expert in range(8)]
    for first, member in ((2, 0), (2, 7), (1, 4)):
        cost = (hidden[first][:, None] - hidden[member]).norm(dim=-1)
        if align == "both":
            cost += (weights[first][:, None] - weights[member]).norm(dim=-1)
        best = min(
            itertools.permutations(range(4)), key=lambda order: float(cost[range(4), order].sum())
        )
        assert found[member].tolist() == list(best)
