"""Condensing as an edit: what it says of itself, and what it leaves."""

from __future__ import annotations

import torch
from families import tiny_model

from moe_lab.models.condensing import condensed
from moe_lab.models.editing import DenseMLP
from moe_lab.models.edits.base import Fate, GatedParts
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.layers import moe_layers

CONDENSE = CondenseLayer(
    1, "model.layers.1.mlp", experts=(5, 2), gates=(0.4, 0.3), shared_gate=0.5,
    divergence=(0.3, 0.2, 0.1), widths=(24, 16, 16),
)  # fmt: skip


def test_what_it_says_of_itself() -> None:
    assert (CONDENSE.title, CONDENSE.experts_kept, CONDENSE.trains) == ("condense", (5, 2), "all")
    assert CONDENSE.num_experts_left is None and not CONDENSE.leaves_moe
    assert CONDENSE.cells == {"gates": [["shared", 0.5], 0.4, 0.3]}
    assert CONDENSE.gated_parts == GatedParts((24, 16, 16), 2)
    fates = [Fate("removed"), Fate("joined", 2), Fate("joined", 1)]
    assert [CONDENSE.fate(expert) for expert in (0, 2, 5)] == fates
    assert CONDENSE.left(moe_layers(tiny_model("qwen2_moe"))[0].info) is None


def test_it_leaves_the_sum_of_its_parts() -> None:
    layer = moe_layers(tiny_model("qwen2_moe"))[0]
    made, x_TD = CONDENSE.apply(layer, {}), torch.randn(5, 32)
    assert isinstance(made, DenseMLP) and made is not layer.block
    expected = condensed(layer, (5, 2), (0.4, 0.3), 0.5)
    assert torch.equal(made(x_TD), expected(x_TD))
