"""A layer condensed to some of its hidden units: what it says of itself, and what it leaves."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from moe_lab.models.dense_units import UnitWeights, columns_name, rows_name, units_name
from moe_lab.models.editing import DenseMLP
from moe_lab.models.edits.base import Fate
from moe_lab.models.edits.condense_units import CondenseUnits
from moe_lab.models.edits.plan import read_edit
from moe_lab.models.layers import moe_layers
from moe_lab.types import UserError

EDIT = CondenseUnits(
    1, "model.layers.1.mlp", width=3, experts=(5, 2), units=(1, 1), shared_units=1,
    ridge="0.01 of the mean", errors=(0.3, 0.2, 0.1),
)  # fmt: skip
UNITS_W2 = torch.tensor([[5, 15], [-1, 0], [2, 3]], dtype=torch.int32)
COLUMNS_DW = torch.arange(96.0).reshape(32, 3) / 96
TENSORS = {units_name(1): UNITS_W2, columns_name(1): COLUMNS_DW}


def test_what_it_says_of_itself() -> None:
    assert (EDIT.title, EDIT.experts_kept) == ("condense to 3 hidden units", (5, 2))
    assert EDIT.trains == "all" and not EDIT.leaves_moe and EDIT.gated_parts is None
    assert EDIT.cells["hidden units"] == [["shared", 1], 1, 1]
    assert EDIT.cells["ridge"] == ["0.01 of the mean"]
    fates = [Fate("removed"), Fate("joined", 1), Fate("joined", 1)]
    assert [EDIT.fate(expert) for expert in (0, 2, 5)] == fates
    assert read_edit(EDIT.to_json()) == EDIT


@torch.no_grad()
def test_it_leaves_the_units_with_the_new_columns() -> None:
    layer, x_TD = moe_layers(tiny_model("qwen2_moe"))[0], torch.randn(5, 32)
    made = EDIT.apply(layer, TENSORS)
    assert isinstance(made, DenseMLP) and made is not layer.block
    hidden_TW = UnitWeights(layer).hidden(UNITS_W2.long())(x_TD)
    torch.testing.assert_close(made(x_TD), hidden_TW @ COLUMNS_DW.T)
    assert EDIT.restructure(layer, {}).down_proj.weight.shape == (32, 3)


@torch.no_grad()
def test_rows_that_were_fitted_take_the_place_of_the_units_own() -> None:
    layer, x_TD = moe_layers(tiny_model("qwen2_moe"))[0], torch.randn(5, 32)
    rows = {rows_name(1, which): torch.randn(3, 32) for which in ("gate_proj", "up_proj")}
    edit = read_edit(EDIT.to_json() | {"fitted": "all"})
    made = edit.apply(layer, TENSORS | rows)
    gate_TW, up_TW = (x_TD @ row_WD.T for row_WD in rows.values())
    expected = (torch.nn.functional.silu(gate_TW) * up_TW) @ COLUMNS_DW.T
    torch.testing.assert_close(made(x_TD), expected)
    with pytest.raises(UserError, match="gate_proj must have the shape"):
        edit.apply(layer, TENSORS)


def test_a_plan_of_another_model_is_refused() -> None:
    layer = moe_layers(tiny_model("qwen2_moe"))[0]
    strange = TENSORS | {units_name(1): UNITS_W2 + 8}
    with pytest.raises(UserError, match="units of experts 7 to 13, and the layer has"):
        EDIT.apply(layer, strange)
    with pytest.raises(UserError, match="must have the shape"):
        EDIT.apply(layer, {})
