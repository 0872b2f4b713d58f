"""What is read off the weights, against loops over experts and rows."""

from __future__ import annotations

import pytest
import torch
from families import EACH_FAMILY, tiny_model
from stand_ins import KEPT, replaced

from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.profile import weights
from moe_lab.types import NotFinite, UserError

MATRICES = ("gate_up_proj", "down_proj")


@EACH_FAMILY
def test_sums_are_those_of_each_expert_by_itself(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases do not count, and neither does it how many experts are read at a time."""
    for layer in moe_layers(tiny_model(family)):
        found = weights.weight_statistics(layer)
        monkeypatch.setattr(weights, "CACHED", 1500)
        assert all(torch.equal(found[n], v) for n, v in weights.weight_statistics(layer).items())
        for expert in range(8):
            values = [float(x) for name in MATRICES
                      for x in getattr(layer.experts, name)[expert].detach().flatten()]  # fmt: skip
            row = [float(x) for x in layer.router.weight[expert].detach()]
            assert len(values) == found["weight_count"].item() == 3 * 32 * 16
            absolute, square = (found[f"weight_{name}_sum"][expert] for name in ("abs", "square"))
            assert absolute.item() == pytest.approx(sum(map(abs, values)), rel=1e-6)
            assert square.item() == pytest.approx(sum(x * x for x in values), rel=1e-6)
            norm = sum(x * x for x in row) ** 0.5
            assert found["router_norm"][expert].item() == pytest.approx(norm, rel=1e-6)


@EACH_FAMILY
def test_neurons_are_those_of_each_hidden_unit_by_itself(family: str) -> None:
    """Rows of gate and up with their biases, and a column of down, wherever they lie."""
    for layer in moe_layers(tiny_model(family)):
        found, experts = weights.neuron_statistics(layer), layer.experts
        biased = hasattr(experts, "down_proj_bias")
        for expert, unit in ((0, 0), (3, 5), (7, 15)):
            up, down = (getattr(experts, name)[expert].detach().double() for name in MATRICES)
            column = down[unit] if biased else down[:, unit]
            if biased:
                bias = experts.gate_up_proj_bias[expert].detach().double()
                rows = [*up[:, 2 * unit], *up[:, 2 * unit + 1], bias[2 * unit], bias[2 * unit + 1]]
            else:
                rows = [*up[unit], *up[unit + 16]]
            values = {
                "down_abs_sum": sum(abs(float(x)) for x in column),
                "down_square_sum": sum(float(x) ** 2 for x in column),
                "neuron_square_sum": sum(float(x) ** 2 for x in [*rows, *column]),
            }
            for name, value in values.items():
                assert found[name].shape == (8, 16)
                assert found[name][expert, unit].item() == pytest.approx(value, rel=1e-6), name


def test_rows_without_an_expert_have_no_weights() -> None:
    model = tiny_model("mixtral")
    plain = [weights.weight_statistics(layer) for layer in moe_layers(model)]
    apply_plan(model, replaced(model, "zero"))
    found = weights.weight_statistics(moe_layers(model)[0])
    for name in ("weight_abs_sum", "weight_square_sum"):
        expected = [plain[0][name][e].item() if e in KEPT["zero"] else 0.0 for e in range(8)]
        assert found[name].tolist() == expected
    assert torch.equal(found["router_norm"], plain[0]["router_norm"])


def test_a_router_without_rows_is_refused() -> None:
    layer = moe_layers(tiny_model("mixtral"))[0]
    layer.router.weight = torch.nn.Parameter(torch.ones(3, 5))
    with pytest.raises(UserError, match="no weight with a row for each expert"):
        weights.router_row_norms(layer)


@pytest.mark.parametrize(
    ("family", "part", "name"),
    [
        ("deepseek_v3", "router", "e_score_correction_bias"),
        ("gpt_oss", "router", "bias"),
        ("gpt_oss", "experts", "down_proj_bias"),
        ("gpt_oss", "experts", "gate_up_proj_bias"),
    ],
)
@torch.no_grad()
def test_a_bias_that_no_sum_tells_of_is_looked_at(family: str, part: str, name: str) -> None:
    """A bias of NaN makes its expert the first choice of every token, and every sum finite."""
    layer = moe_layers(tiny_model(family))[1]
    bias = getattr(getattr(layer, part), name)
    bias[5].fill_(torch.nan)
    expected = rf"layer {layer.info.index}, expert 5: its part of {name} is NaN"
    with pytest.raises(NotFinite, match=expected):
        weights.weight_statistics(layer)
    bias[5].fill_(-torch.inf)  # masks the expert
    weights.weight_statistics(layer)
