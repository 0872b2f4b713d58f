"""Forms of a saved model: stock wherever the family can say it, and how much padding."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest
import torch
from edited_models import applied, condense, drop, edited, in_fresh_process, moe_indices, prune
from families import FAMILIES, logits_of, tiny_model
from safetensors.torch import load_file

from moe_lab.models import routers as model_routers
from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.editing import prune_layer
from moe_lab.models.edits.plan import read_edit
from moe_lab.models.forms import form_of
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint


def test_uniformly_pruned_models_are_stock_in_every_family(tmp_path: Path) -> None:
    folders = []
    for family in FAMILIES:
        edits = [prune(index, [7, 0, 1, 3, 4, 6]) for index in moe_indices(family)]
        if family == "deepseek_v3":  # two groups of three
            edits = [prune(index, [0, 1, 3, 4, 6, 7]) for index in moe_indices(family)]
        folders.append(tmp_path / family)
        assert edited(family, edits, folders[-1]), family
    assert in_fresh_process("stock", folders) == dict.fromkeys(FAMILIES, 0.0)
    values = json.loads((tmp_path / "qwen3_moe" / "model" / "config.json").read_text())
    assert values["num_experts"] == values["num_local_experts"] == 6


def test_condensed_models_are_stock_where_the_family_can_say_it(tmp_path: Path) -> None:
    stock = {
        "qwen2_moe": [condense(1, [5, 2, 6]), condense(3, [0])],
        "qwen3_moe": [condense(0, [1, 2]), condense(2, [7])],
        "deepseek_v2": [condense(1, [3])],
        "deepseek_v3": [condense(1, [3]), condense(2, [1, 2])],
        "glm4_moe": [condense(1, []), condense(2, [4, 5])],
    }
    for family, edits in stock.items():
        assert edited(family, edits, tmp_path / family), family
    folders = [tmp_path / family for family in stock]
    assert in_fresh_process("stock", folders) == dict.fromkeys(stock, 0.0)


def closed_form(dense_width: int, widths: list[int], padded: bool) -> int:
    """Parameters of the tiny qwen2_moe, layer 0 dense, layers 1, 2, … condensed to `widths`."""
    hidden, layers, vocabulary, experts = 32, 4, 96, 8
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * hidden // 2 + hidden // 2)
    moe = experts * 3 * hidden * 16 + experts * hidden + 3 * hidden * 24 + hidden
    dense = [dense_width, *([max(dense_width, *widths)] * len(widths) if padded else widths)]
    if padded:
        dense[0] = max(dense)
    rest = layers * (attention + 2 * hidden) + hidden + 2 * vocabulary * hidden
    return rest + 3 * hidden * sum(dense) + (layers - len(dense)) * moe


@pytest.mark.parametrize("experts", [[], [5, 2, 6]], ids=["S", "SR"])
@pytest.mark.parametrize("padding", [None, 1.0])
def test_condensed_layers_keep_their_exact_size_unless_padding_may_be_added(
    experts: list[int], padding: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="moe_lab.models.streamed")
    edits = [condense(1, experts), condense(2, experts)]
    folder = tmp_path / "x"
    assert edited("qwen2_moe", edits, folder, padding, intermediate_size=400) == (padding == 1.0)
    model, expected = load(folder / "model"), load_file(folder / "expected.safetensors")
    width = 24 + 16 * len(experts)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number == closed_form(400, [width, width], padded=padding == 1.0)
    assert in_fresh_process("stock" if padding else "ours", [folder]) == {"x": 0.0}
    with torch.no_grad():
        inputs = {key: expected[key] for key in ("input_ids", "attention_mask")}
        assert torch.equal(model(**inputs).logits, expected["logits"])
    [line] = caplog.messages
    assert f"dense layers {width} and 400 wide, padded with zeros to 400" in line
    assert "method.padding=0" in line
    # What is written again from there, as after fine-tuning, keeps its form.
    assert save_checkpoint(model, tmp_path / "again", folder / "model").stock == (padding == 1.0)
    again = load(tmp_path / "again")
    assert sum(parameter.numel() for parameter in again.parameters()) == number


def test_the_form_is_known_without_weights(tmp_path: Path) -> None:
    cases = {
        "qwen2_moe": [condense(1, [5, 2, 6]), condense(3, [0])],
        "mixtral": [condense(1, [0, 4])],
        "deepseek_v3": [condense(2, [0, 4])],
        "deepseek_v2": [{"index": 2, "edit": "drop_layer"}, condense(1, [1])],
        "olmoe": [prune(1, [0, 1, 2]), prune(2, [1, 2, 3])],
        "glm4_moe": [{"index": 2, "edit": "drop_block"}],
    }
    for family, edits in cases.items():
        for padding in (0.0, 1.0):
            folder = tmp_path / f"{family}{padding}"
            stock = edited(family, edits, folder, padding)
            names = {one.info.index: one.info.name for one in moe_layers(tiny_model(family))}
            plan = [read_edit({"name": names[edit["index"]], **edit}) for edit in edits]
            form = form_of(resolve(folder / "source").config, plan, padding)
            assert form.stock == stock, form.reason
            assert form.config.num_hidden_layers == load(folder / "model").config.num_hidden_layers


def test_dropped_layers_are_saved_in_the_smallest_form_that_loads(tmp_path: Path) -> None:
    """Zeros as wide as the dense layer 0 would not be small; one unit where there is none is."""
    stock = {"qwen3_moe": True} | dict.fromkeys(["qwen2_moe", "mixtral", "olmoe", "gpt_oss"], False)
    stock |= {"deepseek_v2": False, "deepseek_v3": False}
    folders = [tmp_path / family for family in stock]
    for folder in folders:
        edits = [drop("drop_layer", 1), drop("drop_layer", 2)]
        assert edited(folder.name, edits, folder, 0.01) == stock[folder.name]
        model = load(folder / "model")  # warnings are errors: no tensor of no size is made
        expected = load_file(folder / "expected.safetensors")
        assert torch.equal(logits_of(model), expected["logits"])
        if not stock[folder.name]:
            in_memory = applied(folder.name, edits)
            assert sum(p.numel() for p in model.parameters()) == sum(
                p.numel() for p in in_memory.parameters()
            )
            assert not any(p.numel() == 0 for p in model.parameters())
    assert in_fresh_process("ours", folders) == dict.fromkeys(stock, 0.0)
    assert in_fresh_process("stock", folders[:1]) == {"qwen3_moe": 0.0}
    assert edited("qwen2_moe", [drop("drop_layer", 1)], tmp_path / "padded", 1.0)
    assert in_fresh_process("stock", [tmp_path / "padded"]) == {"padded": 0.0}


STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "moe_lab" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits.double().tolist()
print("RESULT" + json.dumps([model.config.num_experts_per_tok, logits]))
"""


@pytest.mark.parametrize("family,twins", [("mixtral", True), ("glm4_moe", True), ("olmoe", False)])
def test_twins_make_unequal_layers_native_where_they_change_nothing(
    family: str, twins: bool, tmp_path: Path
) -> None:
    """olmoe does not renormalise: a twin would take half of an expert's weight."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    model_routers.set_top_k(model, 1)
    for number, layer in enumerate(moe_layers(model)):
        prune_layer(layer, range(3 + number))
    ids = torch.arange(5, 40)[None]
    expected = model(ids).logits
    exact = sum(parameter.numel() for parameter in model.parameters())
    assert not save_checkpoint(model, tmp_path / "exact", tmp_path / "source", padding=0).stock
    assert torch.equal(load(tmp_path / "exact")(ids).logits, expected)
    form = save_checkpoint(
        load(tmp_path / "exact"), tmp_path / "filled", tmp_path / "source", twins=1
    )
    assert form.stock == twins
    if not twins:
        return
    assert Checkpoint(tmp_path / "filled").repeats_experts
    assert not Checkpoint(tmp_path / "exact").repeats_experts
    filled = load(tmp_path / "filled")
    numbers = {str(layer.info.index): 3 + i for i, layer in enumerate(moe_layers(filled))}
    assert filled.config.distinct_experts == numbers
    assert sum(p.numel() for p in filled.parameters()) == exact + form.repeated
    top_k, logits = fresh.result(STOCK, tmp_path / "filled", json.dumps(ids.tolist()))
    assert top_k == 1
    found = torch.tensor(logits, dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_two_experts_for_each_token_take_no_twins(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "source")
    for number, layer in enumerate(moe_layers(model)):
        prune_layer(layer, range(3 + number))
    assert not save_checkpoint(model, tmp_path / "out", tmp_path / "source", twins=1).stock
