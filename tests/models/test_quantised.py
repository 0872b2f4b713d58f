"""Quantised checkpoints: FP8 and MXFP4 are dequantised, whole or by layers; others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_folders import copied, refusal, write_intact
from edited_models import assert_written_as_in_memory
from families import logits_of, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.models.checkpoint import Checkpoint, load, resolve
from moe_lab.models.edited_model import Saving
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.quantised import quantised_as
from moe_lab.models.saving import save_checkpoint
from moe_lab.models.stored import stored_in
from moe_lab.models.streamed import write_edited
from moe_lab.models.weight_files import size_in_bytes, weight_files
from moe_lab.stages.checks import announce_dequantising
from moe_lab.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and their negatives behind
NARROW = {"F8_E4M3", "U8"}


def say_quantised(folder: Path, values: Any, field: str = "quantization_config") -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: values}))


def write_fp8(folder: Path) -> dict[str, Tensor]:
    """A tiny deepseek_v3 in blocks of 8 x 8, one factor each; its weights, multiplied by hand."""
    tiny_model("deepseek_v3").save_pretrained(folder)
    generator, plain, stored = torch.Generator().manual_seed(3), {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain[name] = stored[name] = tensor
        if "_proj" in name and name.endswith(".weight"):
            rows, columns = (size // 8 for size in tensor.shape)
            factors = torch.rand(rows, columns, generator=generator) + 0.5
            stored |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": factors}
            plain[name] = stored[name].float() * factors.kron(torch.ones(8, 8))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    say_quantised(folder, FP8)
    return plain


def write_mxfp4(folder: Path) -> dict[str, Tensor]:
    """A tiny gpt_oss, 32 values with one exponent; its weights, unpacked by hand."""
    tiny_model("gpt_oss", intermediate_size=32).save_pretrained(folder)
    generator, plain, stored = torch.Generator().manual_seed(3), {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            plain[name] = stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 128, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = torch.tensor([*E2M1, *(-value for value in E2M1)])
        pairs = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], -1)
        exponents = torch.pow(2.0, scales.float() - 127)[..., None]
        whole = (pairs.flatten(-2) * exponents).flatten(-2)
        plain[name] = whole.transpose(1, 2).contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    say_quantised(folder, MXFP4)
    return plain


WRITE = {"FP8": write_fp8, "MXFP4": write_mxfp4}


@pytest.mark.parametrize("kind", WRITE)
def test_it_is_dequantised_whole_and_by_layers(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, dense, out = tmp_path / "source", tmp_path / "dense", tmp_path / "out"
    plain = WRITE[kind](source)
    copied(source, dense)
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config))
    checkpoint = resolve(source)
    assert quantised_as(checkpoint.config) == kind
    want = logits_of(load(dense), tiny_batch())
    model = checkpoint.load()
    assert torch.equal(logits_of(model, tiny_batch()), want)
    assert not hasattr(model.config, "quantization_config")

    layerwise = LayerwiseModel(checkpoint)
    for index, decoder in enumerate(model.model.layers):
        with layerwise.layer(index) as filled:
            for name, tensor in decoder.state_dict().items():
                assert torch.equal(filled.state_dict()[name], tensor), (index, name)

    layers = checkpoint.layers()
    with caplog.at_level("WARNING"):
        announce_dequantising(checkpoint, layers)
    size = size_in_bytes(dense)
    assert abs(layers[0].model_bytes - size) < 16384 and size > size_in_bytes(source)
    assert (
        f"is stored in {kind}" in caplog.text
        and f"{layers[0].model_bytes / 2**30:.3g} GiB" in caplog.text
    )

    apply_plan(model, Plan(tuple(
        PruneExperts(layer.info.index, layer.info.name, kept=(0, 1, 4, 5))
        for layer in moe_layers(model)
    )))  # fmt: skip
    want = logits_of(model, tiny_batch())
    assert save_checkpoint(model, out, source).stock
    assert torch.equal(logits_of(load(out), tiny_batch()), want)
    stored = [one for file in weight_files(out) for one in stored_in(file)]
    assert not {one.kind for one in stored} & NARROW
    assert not [one.key for one in stored if one.key.endswith(("_scale_inv", "_blocks", "_scales"))]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert refusal_of_folder(out) is None


def refusal_of_folder(folder: Path) -> str | None:
    try:
        resolve(folder).layers()
    except UserError as error:
        return str(error)
    return None


def test_plain_weights_are_announced_as_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    announce_dequantising(checkpoint, checkpoint.layers())
    assert quantised_as(checkpoint.config) is None and "dequantised" not in caplog.text


METHODS: dict[str, Any] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, unnamed": {"load_in_8bit": True},
    "hqq": {"quant_method": "hqq"},
    "quanto": {"quant_method": "quanto"},
    "torchao": {"quant_method": "torchao"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "nonsense": {"quant_method": "nonsense"},
    "None": {},
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    write_intact("mixtral", folder, tokenizer)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_other_ways_are_refused_with_what_to_give(
    method: str, intact: Path, tmp_path: Path
) -> None:
    for field in ("quantization_config", "compression_config"):
        folder = copied(intact, tmp_path / "broken")
        say_quantised(folder, METHODS[method], field)
        told = refusal(folder)
        assert told and f"{field}: {method.split(',')[0]}" in told
        assert "give the unquantised weights" in told and "FP8 and MXFP4" in told
        with pytest.raises(UserError, match="unquantised"):
            load(folder)


@pytest.mark.parametrize("value", ["fp8", [1], 5, True])
def test_a_config_of_quantisation_that_is_none(value: Any, intact: Path, tmp_path: Path) -> None:
    folder = copied(intact, tmp_path / "broken")
    say_quantised(folder, value)
    assert f"quantization_config={value!r} must be an object" in str(refusal(folder))


@pytest.mark.parametrize(
    "wrong",
    [{"weight_block_size": [128]}, {"weight_block_size": [0, -1]}, {"activation_scheme": "x"}],
    ids=str,
)
def test_fp8_of_a_sort_that_there_is_not(wrong: Any, intact: Path, tmp_path: Path) -> None:
    folder = copied(intact, tmp_path / "broken")
    say_quantised(folder, {"quant_method": "fp8"} | wrong)
    told = str(refusal(folder))
    assert "config.json: quantization_config=" in told and next(iter(wrong)) in told


@pytest.mark.parametrize("values", [FP8, MXFP4])
def test_weights_that_are_not_quantised_at_all(values: Any, intact: Path, tmp_path: Path) -> None:
    folder = copied(intact, tmp_path / "broken")
    say_quantised(folder, values)
    assert "none of its tensors is quantised: remove that field" in str(refusal(folder))


def test_factors_that_are_missing_are_named(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors = load_file(file)
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, file, {"format": "pt"})
    told = refusal_of_folder(tmp_path)
    assert told and f"{name} is stored in FP8, and {name}_scale_inv" in told


def test_factors_that_do_not_fit_are_told(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors = load_file(file)
    for factors in (torch.rand(3, 4), torch.rand(2, 7)):
        save_file(tensors | {f"{name}_scale_inv": factors}, file, {"format": "pt"})
        told = refusal_of_folder(tmp_path)
        assert told and "model.layers.2.mlp.experts.gate_up_proj" in told and "divisible" in told


@pytest.mark.parametrize("kind", WRITE)
def test_a_plan_is_written_dequantised(kind: str, tmp_path: Path) -> None:
    WRITE[kind](tmp_path / "source")
    source = resolve(tmp_path / "source")
    one = source.layers()[0]
    kept = tuple(range(one.num_experts - one.groups))
    plan = Plan((PruneExperts(one.index, one.name, kept=kept),))
    write_edited(source, plan, tmp_path / "new", Saving())
    assert_written_as_in_memory(source, plan, tmp_path / "new")
