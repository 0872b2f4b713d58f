"""What lies in a checkpoint's files: dtypes, and tensors that the model does not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import logits_of, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.models.depth import drop_decoders
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stored import NOT_LOADED, ONE_OF_SEVERAL, held_by, stored_in
from moe_lab.models.weight_files import weight_files

pytestmark = pytest.mark.filterwarnings("ignore")
PASSING = {  # what some training code left there
    "value_head.layers.0.weight": torch.randn(32).bfloat16(),
    "model.layers.2.load": torch.rand(4),
    "model.layers.1.self_attn.old.weight": torch.randn(16, 32),
    "steps": torch.tensor(7),
}
NEEDLESS = {  # which models compute themselves, or which goes with a weight that is dequantised
    "model.layers.2.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "model.layers.0.self_attn.q_proj.weight_scale_inv": torch.rand(1),
}


def write(folder: Path, family: str, dtypes: dict[str, torch.dtype], **more: Tensor) -> None:
    """A tiny model in bfloat16, but for tensors whose names end so; more: other tensors."""
    tiny_model(family).bfloat16().save_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    for key, tensor in whole.items():
        other = next((dtype for end, dtype in dtypes.items() if key.endswith(end)), None)
        if other is not None:
            whole[key] = torch.randn(tensor.shape).to(other)
    save_file(whole | more, folder / "model.safetensors", {"format": "pt"})


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bytes of the same kind."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("computing", ["auto", "float32"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_each_tensor_keeps_the_dtype_and_the_bytes_of_its_file(
    family: str, computing: str, tmp_path: Path
) -> None:
    dtypes = {"norm.weight": torch.float32, "gate.weight": torch.float32, "_bias": torch.float32,
              "q_proj.weight": torch.float16}  # fmt: skip
    write(tmp_path / "source", family, dtypes)
    checkpoint = Checkpoint(tmp_path / "source", computing)
    save_checkpoint(checkpoint.load(), tmp_path / "whole", tmp_path / "source")
    source, whole = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "whole"))
    assert {tensor.dtype for tensor in source.values()} >= {torch.float32, torch.bfloat16}
    assert whole.keys() == source.keys()
    assert [key for key in source if not same(source[key], whole[key])] == []
    told = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("source", "whole")]
    assert told[0]["dtype"] == told[1]["dtype"] == "bfloat16"
    files = sum(file.stat().st_size for file in weight_files(tmp_path / "whole"))
    assert checkpoint.layers()[0].model_bytes == files


def test_a_tensor_that_was_changed_is_written_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "source", "mixtral", {"norm.weight": torch.float32})
    model = load(tmp_path / "source")
    with torch.no_grad():
        model.model.norm.weight += 1
    changed = model.model.norm.weight.detach().clone()
    assert changed.dtype == torch.bfloat16
    save_checkpoint(model, tmp_path / "out", tmp_path / "source")
    made = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert same(made, changed.float())


def test_what_no_model_holds_is_carried_over(tmp_path: Path) -> None:
    source, out, again = (tmp_path / name for name in ("source", "out", "again"))
    write(source, "mixtral", {}, **PASSING, **NEEDLESS)
    model = load(source)
    infos = [layer.info for layer in moe_layers(model)]
    edits = (PruneExperts(one.index, one.name, kept=(0, 1, 2, 5)) for one in infos)
    apply_plan(model, Plan(tuple(edits)))
    want = logits_of(model, tiny_batch())
    save_checkpoint(model, out, source)
    assert {one.key for one in stored_in(out / NOT_LOADED)} == PASSING.keys()
    carried = load_file(out / NOT_LOADED)
    assert all(same(carried[key].reshape(-1), PASSING[key].reshape(-1)) for key in PASSING)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    whole = load_file(out / ONE_OF_SEVERAL)
    assert index["weight_map"].keys() == whole.keys() | PASSING.keys()
    size = sum(tensor.nbytes for tensor in (whole | PASSING).values())
    assert index["metadata"]["total_size"] == size
    assert torch.equal(logits_of(load(out), tiny_batch()), want)
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits_of(stock, tiny_batch()), want)
    save_checkpoint(load(out), again, out)
    assert (again / NOT_LOADED).read_bytes() == (out / NOT_LOADED).read_bytes()


def test_layers_with_other_numbers_leave_what_was_theirs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write(source, "mixtral", {}, **PASSING)
    model = load(source)
    drop_decoders(model, "model.layers", [1])
    save_checkpoint(model, out, source)
    gone = {key for key in PASSING if key.startswith("model.layers.")}
    assert {one.key for one in stored_in(out / NOT_LOADED)} == PASSING.keys() - gone
    assert "2 tensors of decoder layers" in caplog.text


def test_names_are_those_of_the_model_and_layers_of_others_are_none_of_its_own(
    tmp_path: Path,
) -> None:
    write(tmp_path / "source", "qwen3_moe", {}, **PASSING)
    checkpoint = Checkpoint(tmp_path / "source")
    model = checkpoint.load()
    files = held_by(model, weight_files(checkpoint.path))
    assert files.by_name.keys() == model.state_dict().keys()
    assert len(files.by_name["model.layers.1.mlp.experts.gate_up_proj"]) == 2 * 8
    assert sorted(one.key for parts in files.others.values() for one in parts) == sorted(PASSING)
    opened = LayerwiseModel(checkpoint)
    assert sorted(part for part in opened._stored if part is not None) == [0, 1, 2, 3]
    with opened.layer(0) as decoder:
        want = model.model.layers[0].input_layernorm.weight
        assert torch.equal(decoder.input_layernorm.weight, want)


def test_rows_that_stay_of_a_router_in_float32_are_those_of_its_file(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write(source, "deepseek_v3", {"gate.weight": torch.float32, "_bias": torch.float32})
    model, kept = load(source), [0, 2, 3, 5, 6, 7]
    assert model.dtype == torch.bfloat16
    infos = [layer.info for layer in moe_layers(model)]
    apply_plan(model, Plan(tuple(PruneExperts(i.index, i.name, kept=tuple(kept)) for i in infos)))
    save_checkpoint(model, out, source)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    routers = [name for name in after if ".gate." in name]
    assert len(routers) == 2 * len(infos)
    for name in routers:
        assert after[name].dtype == torch.float32 and torch.equal(after[name], before[name][kept])
