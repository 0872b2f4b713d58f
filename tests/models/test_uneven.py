"""Experts of different widths in a checkpoint's files: written, read back, and worked on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edited_models import in_fresh_process
from families import EACH_FAMILY, FAMILIES, logits_of, tiny_batch, tiny_model
from narrowing import UNEVEN, narrow
from odd_families import ADAPTED, odd_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moe_lab.measure.speed import active_parameters, parameters
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.editing import prune_layer
from moe_lab.models.forms import Form
from moe_lab.models.hidden_units import HiddenUnits, unit_parameters
from moe_lab.models.layers import moe_layers, num_parameters
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.narrowing import fit_implementation
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.uneven import cut_apart, joined, uneven_tensors
from moe_lab.models.widths import num_zeros, widths_of
from moe_lab.types import UserError


def saved(
    family: str, folder: Path, padding: float = 0.0, widths: tuple[int, ...] = UNEVEN
) -> tuple[PreTrainedModel, Form, torch.Tensor]:
    """A tiny model whose layers all have experts of these widths, saved, and its logits."""
    model = odd_model(family) if family in ADAPTED else tiny_model(family)
    model.save_pretrained(folder / "source")
    narrow(model, widths)
    expected = logits_of(model)
    form = save_checkpoint(model, folder / "model", folder / "source", padding)
    batch = tiny_batch(padding=False)
    with torch.no_grad():
        save_file(batch | {"logits": model(**batch).logits}, folder / "expected.safetensors")
    return model, form, expected


def shapes_in(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text", "dbrx", "jetmoe", "longcat_flash"])
def test_each_expert_has_its_own_size_in_the_files(family: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    model, form, expected = saved(family, tmp_path / "x")
    padded = "experts 0 to 12 wide, padded with zeros to 12" in form.reason
    assert not form.stock and (padded or family == "llama4_text")
    shapes = shapes_in(tmp_path / "x" / "model")
    uneven = uneven_tensors(model)
    layer = moe_layers(model)[0]
    assert len(uneven) == len(moe_layers(model)) * len(HiddenUnits(layer.experts).places)
    for name, one in uneven.items():
        assert name not in shapes and f"{name}.0" not in shapes, "an expert without units"
        assert all(shapes[f"{name}.{i}"] == list(one.row_shape(i)) for i in range(1, 8))
    again = load(tmp_path / "x" / "model")
    assert torch.equal(logits_of(again), expected)
    assert all(widths_of(one.experts) == UNEVEN for one in moe_layers(again))
    with torch.no_grad():
        whole = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert num_parameters(again) == whole - num_zeros(again)[0]
    buffers = sum(buffer.numel() for name, buffer in again.state_dict().items()
                  if name not in dict(again.named_parameters()))  # fmt: skip
    assert stored == num_parameters(again) + buffers


@EACH_FAMILY
def test_fresh_processes_read_them_and_stock_refuses(family: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    saved(family, tmp_path / "x")
    assert in_fresh_process("ours", [tmp_path / "x"]) == {"x": 0.0}
    assert "refused" in str(in_fresh_process("stock", [tmp_path / "x"])["x"])


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_with_enough_padding_they_are_stock(family: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    model, form, expected = saved(family, tmp_path / "x", padding=1.0)
    assert form.stock and "experts 0 to 12 wide, padded with zeros to 12" in form.reason
    assert in_fresh_process("stock", [tmp_path / "x"]) == {"x": 0.0}
    assert torch.equal(logits_of(load(tmp_path / "x" / "model")), expected)
    assert {one.info.expert_width for one in moe_layers(model)} == {12}
    assert num_zeros(model) == (0, 0), "which are stored now"


def test_layers_may_differ_and_only_uneven_ones_are_cut(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "x" / "source")
    narrow(model, {0: UNEVEN, 1: (8,) * 8, 3: (5,) * 8})
    expected = logits_of(model)
    form = save_checkpoint(model, tmp_path / "x" / "model", tmp_path / "x" / "source", 0.0)
    told = json.loads((tmp_path / "x" / "model" / "config.json").read_text())["moe_lab"]
    assert not form.stock and told["version"] == 3
    assert told["layers"]["0"] == {"num_experts": 8, "expert_widths": list(UNEVEN)}
    assert told["layers"]["1"] == {"num_experts": 8, "expert_width": 8}
    assert told["layers"]["2"] == {"num_experts": 8}
    shapes = shapes_in(tmp_path / "x" / "model")
    assert shapes["model.layers.3.mlp.experts.7.gate_proj.weight"] == [5, 32]
    assert shapes["model.layers.0.mlp.experts.gate_up_proj.7"] == [6, 32]
    assert torch.equal(logits_of(load(tmp_path / "x" / "model")), expected)


def test_version_2_is_written_where_that_says_it(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source")
    narrow(model, {0: (8,) * 8})
    save_checkpoint(model, tmp_path / "model", tmp_path / "source", 0.0)
    told = json.loads((tmp_path / "model" / "config.json").read_text())["moe_lab"]
    assert told["version"] == 2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_they_are_read_layer_by_layer_and_counted(family: str, tmp_path: Path) -> None:
    model, _, _ = saved(family, tmp_path)
    opened = LayerwiseModel(Checkpoint(tmp_path / "model"))
    for number, decoder in enumerate(opened.layers):
        with opened.layer(number):
            mine = model.get_submodule(f"model.layers.{number}").state_dict()
            assert all(torch.equal(mine[name], one) for name, one in decoder.state_dict().items())
    info = Checkpoint(tmp_path / "model").layers()[0]
    assert info.model_parameters == parameters(model) == num_parameters(model)
    assert info.model_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    dense = tiny_model(family)
    per_unit = moe_layers(dense)[0].info.neuron_parameters
    gone = sum(16 - width for width in UNEVEN) * per_unit
    assert num_parameters(dense) - num_parameters(model) == gone * len(moe_layers(model))
    share = gone * 2 // 8
    assert abs(active_parameters(dense) - active_parameters(model) - 4 * share) <= 4


def test_saved_again_by_transformers_they_keep_their_sizes(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    again = load(tmp_path / "model")
    again.save_pretrained(tmp_path / "again")
    assert shapes_in(tmp_path / "again") == shapes_in(tmp_path / "model")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(again))


def test_a_step_of_training_leaves_zeros_zero(tmp_path: Path) -> None:
    saved("gpt_oss", tmp_path)
    model = load(tmp_path / "model")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    layers = moe_layers(model)
    trained = [one for layer in layers for one in unit_parameters(layer.experts).values()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    model(**tiny_batch(padding=False)).logits.square().mean().backward()
    optimiser.step()
    assert any(not torch.equal(before[name], one) for name, one in model.state_dict().items())
    rest, rows = cut_apart(model, model.state_dict())
    again = {name: part[...] for name, part in joined(model, rest | rows).items()}
    assert all(torch.equal(again[name], one) for name, one in model.state_dict().items()), (
        "something stands where only zeros may be"
    )


def test_pruned_again_the_widths_follow(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    model = load(tmp_path / "model")
    for layer in moe_layers(model):
        prune_layer(layer, [0, 1, 2, 4])
    fit_implementation(model)
    assert [widths_of(one.experts) for one in moe_layers(model)] == [(0, 5, 9, 1)] * 4
    assert moe_layers(model)[0].info.expert_width == 9
    expected = logits_of(model)
    save_checkpoint(model, tmp_path / "again", tmp_path / "model", 0.0)
    assert torch.equal(logits_of(load(tmp_path / "again")), expected)
    for layer in moe_layers(model):
        prune_layer(layer, [1, 2])
    assert widths_of(moe_layers(model)[0].experts) == (5, 9)


def test_what_is_missing_or_of_another_size_is_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj.2"
    save_file({n: t for n, t in tensors.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors.*layers\.1\.mlp\.experts\.down_proj"):
        load(tmp_path / "model")
    save_file(tensors | {name: torch.zeros(32, 8)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"down_proj\.2 is \[32, 8\].* asks for \[32, 9\]"):
        load(tmp_path / "model")
