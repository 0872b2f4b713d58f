"""What was written is read back: whatever is lost or changed on the way is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_lab.models import finishing
from moe_lab.models.editing import prune_layer
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import WholeModel
from moe_lab.models.reading_back import FewTokens, NotReadBack, compare_by_layer
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import NotFinite

EVERY = range(4)


@pytest.fixture
def written(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "dense")
    for layer in moe_layers(model):
        prune_layer(layer, [0, 1, 2, 4, 5, 6])
    save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
    return model, tmp_path / "out"


def few_logits(model: PreTrainedModel) -> Tensor:
    few = FewTokens(WholeModel(model))
    for index in EVERY:
        few.through(index)
    return few.logits()


def test_the_few_tokens_go_the_way_of_a_whole_forward() -> None:
    model = tiny_model("qwen2_moe")
    few = FewTokens(WholeModel(model))
    (ids,) = few._stream.input_ids
    for index in EVERY:
        few.through(index)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(few.logits(), expected.double(), atol=1e-6)


def test_what_is_right_passes(written: tuple[PreTrainedModel, Path]) -> None:
    model, folder = written
    compare_by_layer(folder, few_logits(model), torch.float32, EVERY)


def test_a_changed_tensor_is_noticed(written: tuple[PreTrainedModel, Path]) -> None:
    model, folder = written
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"].view(-1)[5] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotReadBack, match="computes something else"):
        compare_by_layer(folder, few_logits(model), torch.float32, EVERY)


def test_a_config_that_means_something_else_is_noticed(
    written: tuple[PreTrainedModel, Path],
) -> None:
    model, folder = written
    values = json.loads((folder / "config.json").read_text())
    values["routed_scaling_factor"] = 1.0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(NotReadBack, match="computes something else"):
        compare_by_layer(folder, few_logits(model), torch.float32, EVERY)


def test_nan_is_no_agreement(written: tuple[PreTrainedModel, Path]) -> None:
    model, folder = written
    expected = few_logits(model)
    expected[0, 0, 0] = torch.nan
    with pytest.raises(NotReadBack, match="computes something else"):
        compare_by_layer(folder, expected, torch.float32, EVERY)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lm_head.weight", r"logits on a few tokens are not finite \(float32\)"),
        ("model.layers.2.self_attn.o_proj.weight", "layer 2: the hidden state is not finite"),
    ],
)
def test_a_model_that_gives_nan_is_no_checkpoint(name: str, told: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        model.get_parameter(name)[5] = torch.inf
    with pytest.raises(NotFinite, match=told):
        save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_config_that_asks_for_the_routers_logits_is_no_obstacle(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path / "dense")
    for layer in moe_layers(model):
        prune_layer(layer, [0, 1, 2, 4, 5, 6])
    save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
    assert model.config.output_router_logits


def test_saving_itself_fails_where_it_does_not_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    adapt = finishing._adapt_config

    def lossy(path: Path, *given: object) -> None:
        adapt(path, *given)
        values = json.loads(path.read_text())
        values["rope_parameters"]["rope_theta"] = 7.0
        path.write_text(json.dumps(values))

    monkeypatch.setattr(finishing, "_adapt_config", lossy)
    with pytest.raises(NotReadBack, match="computes something else"):
        save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
