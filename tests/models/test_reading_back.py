"""What was written is read back: whatever is lost or changed on the way is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from moe_lab.models import reading_back
from moe_lab.models.editing import prune_layer
from moe_lab.models.layers import moe_layers
from moe_lab.models.reading_back import NotReadBack, check_saved, few_logits
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import NotFinite

WAYS = pytest.mark.parametrize("free", [2**40, 0], ids=["whole", "layer by layer"])


@pytest.fixture
def written(tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "dense")
    for layer in moe_layers(model):
        prune_layer(layer, [0, 1, 2, 4, 5, 6])
    save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
    return model, tmp_path / "out"


def set_free(patch: pytest.MonkeyPatch, free: int) -> None:
    memory = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=free))
    patch.setattr(reading_back, "psutil", memory)


@WAYS
def test_what_is_right_passes(
    written: tuple[PreTrainedModel, Path], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, free)
    model, folder = written
    check_saved(model, folder, few_logits(model), torch.float32)


@WAYS
@pytest.mark.parametrize("key", ["model.layers.2.mlp.experts.3.up_proj.weight", "gate.weight"])
def test_one_changed_number_is_noticed(
    written: tuple[PreTrainedModel, Path], key: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, free)
    model, folder = written
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(key))
    tensors[name].view(-1)[5] += 1e-6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotReadBack, match="tensors are not those that were written"):
        check_saved(model, folder, few_logits(model), torch.float32)


@WAYS
def test_a_config_that_means_something_else_is_noticed(
    written: tuple[PreTrainedModel, Path], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, free)
    model, folder = written
    values = json.loads((folder / "config.json").read_text())
    values["routed_scaling_factor"] = 1.0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(NotReadBack, match="computes something else"):
        check_saved(model, folder, few_logits(model), torch.float32)


def test_nan_is_no_agreement(written: tuple[PreTrainedModel, Path]) -> None:
    model, folder = written
    expected = few_logits(model)
    with torch.no_grad():
        model.get_submodule("model.norm").weight[0] = torch.nan
    with pytest.raises(NotFinite, match=r"^the edited model's model\.norm\.weight is not finite$"):
        check_saved(model, folder, expected, torch.float32)


def test_a_model_that_gives_nan_is_not_written(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(NotFinite, match=r"logits on a few tokens are not finite \(float32\)"):
        save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
    assert not (tmp_path / "out").exists()


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
    save_pretrained = PreTrainedModel.save_pretrained

    def lossy(self: PreTrainedModel, folder: Path, **arguments: object) -> None:
        save_pretrained(self, folder, **arguments)
        values = json.loads((folder / "config.json").read_text())
        values["rope_parameters"]["rope_theta"] = 7.0
        (folder / "config.json").write_text(json.dumps(values))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy)
    with pytest.raises(NotReadBack, match="computes something else"):
        save_checkpoint(model, tmp_path / "out", tmp_path / "dense")
