"""Tensors that are missing, too many, of other shapes or dtypes: by headers, with names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_folders import WEIGHTS, copied, refusal, set_config, set_tensors, write_intact
from families import logits_of, tiny_batch
from safetensors.torch import load_file
from torch import Tensor

from moe_lab.families.tiny import tiny_model as tiny_of
from moe_lab.models.checkpoint import load, resolve
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("fitting")
    for kind in ("mixtral", "deepseek_v3", "gpt_oss"):
        write_intact(kind, folder / kind, tokenizer)
    return folder


def without(part: str) -> Change:
    """All tensors whose names hold `part` are gone."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def with_one(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def cut(name: str, rows: int) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][:rows].contiguous()})


def stored_as(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].abs().mul(9).to(dtype)})


def renamed(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


BLOCK = "model.layers.1.block_sparse_moe"


def an_expert_more(tensors: dict[str, Tensor]) -> None:
    last = {name: tensor for name, tensor in tensors.items() if f"{BLOCK}.experts.7." in name}
    tensors.update({n.replace("experts.7.", "experts.8."): t.clone() for n, t in last.items()})


CASES: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "no head": ("mixtral", without("lm_head"), ("lacks 1 tensors", "lm_head.weight [259, 32]")),
    "no norm": ("mixtral", without("model.norm"), ("lacks 1 tensors", "model.norm.weight [32]")),
    "no router": ("mixtral", without("layers.2.block_sparse_moe.gate"),
                  ("lacks 1 tensors", "model.layers.2.mlp.gate.weight [8, 32]")),
    "no layer": ("mixtral", without("layers.3."), ("lacks", "model.layers.3.")),
    "an expert less": ("mixtral", without("layers.1.block_sparse_moe.experts.7."),
                       ("model.layers.1.mlp.experts.", "[7, ", "asks for [8, ")),
    "a matrix less": ("mixtral", without("layers.1.block_sparse_moe.experts.3.w1"),
                      ("model.layers.1.mlp.experts.gate_up_proj", "do not fit together")),
    "no experts": ("mixtral", without("layers.1.block_sparse_moe.experts"),
                   ("lacks 2 tensors", "model.layers.1.mlp.experts.down_proj [8, 32, 16]")),
    "an expert more": ("mixtral", an_expert_more,
                       ("model.layers.1.mlp.experts.", "[9, ", "asks for [8, ")),
    "a bias of the router": ("mixtral", with_one(f"{BLOCK}.gate.bias", 8),
                             ("of modules that 'mixtral' has", f"{BLOCK}.gate.bias [8]",
                              'model.ignore_tensors=["model.layers.*.block_sparse_moe.gate.bias"]')),
    "a shared expert": ("mixtral", with_one(f"{BLOCK}.shared_expert.up_proj.weight", 16, 32),
                        ("holds 1 tensors", "shared_expert.up_proj.weight [16, 32]")),
    "a bias of attention": ("mixtral", with_one("model.layers.0.self_attn.q_proj.bias", 32),
                            ("holds 1 tensors", "model.layers.0.self_attn.q_proj.bias [32]")),
    "a bias of experts": ("deepseek_v3", with_one("model.layers.2.mlp.experts.1.up_proj.bias", 16),
                          ("holds 1 tensors", "model.layers.2.mlp.experts.1.up_proj.bias [16]")),
    "a bias of a norm": ("gpt_oss", with_one("model.norm.bias", 32), ("model.norm.bias [32]",)),
    "an embedding cut": ("mixtral", cut("model.embed_tokens.weight", 250),
                         ("model.embed_tokens.weight is [250, 32]", "asks for [259, 32]")),
    "a router cut": ("deepseek_v3", cut("model.layers.1.mlp.gate.weight", 6),
                     ("model.layers.1.mlp.gate.weight is [6, 32]", "asks for [8, 32]")),
    "fused experts cut": ("gpt_oss", cut("model.layers.1.mlp.experts.down_proj", 5),
                          ("model.layers.1.mlp.experts.down_proj is [5, 16, 32]", "[8, 16, 32]")),
    "an expert cut": ("mixtral", cut(f"{BLOCK}.experts.0.w2.weight", 30),
                      ("model.layers.1.mlp.experts.down_proj", "do not fit together")),
    "integer weights": ("mixtral", stored_as("lm_head.weight", torch.int8),
                        ("lm_head.weight is stored as I8", "unquantised")),
    "long weights": ("deepseek_v3", stored_as("model.norm.weight", torch.int64),
                     ("model.norm.weight is stored as I64, which is no dtype of weights",)),
    "weights of bits": ("mixtral", stored_as("model.norm.weight", torch.bool),
                        ("model.norm.weight is stored as BOOL",)),
    "fp8 without factors": ("mixtral", stored_as("lm_head.weight", torch.float8_e4m3fn),
                            ("is stored as F8_E4M3", "quantization_config")),
    "complex weights": ("mixtral", stored_as("model.norm.weight", torch.complex64),
                        ("model.norm.weight is stored as C64",)),
    "another name": ("mixtral", renamed("model.norm.weight", "model.norm.gamma"),
                     ("holds 1 tensors", "model.norm.gamma")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_tensors_that_are_not_those_of_the_config(case: str, intact: Path, tmp_path: Path) -> None:
    kind, change, words = CASES[case]
    folder = set_tensors(copied(intact / kind, tmp_path / "broken"), change)
    told = refusal(folder)
    assert told and str(folder) in told and all(word in told for word in words), told
    with pytest.raises(UserError):
        load(folder)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_fewer_layers_than_the_files_have(kind: str, intact: Path, tmp_path: Path) -> None:
    folder = copied(intact / kind, tmp_path / "broken")
    layers = {"layer_types": ["full_attention"] * 3} if kind == "gpt_oss" else {}
    set_config(folder, {"num_hidden_layers": 3} | layers)
    told = refusal(folder)
    assert told and "num_hidden_layers=3, and its files hold the decoder layer 3" in told


def test_what_may_be_lost_is_lost_and_told(
    intact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = copied(intact / "mixtral", tmp_path / "source"), tmp_path / "out"
    names = [f"model.layers.{n}.block_sparse_moe.gate.bias" for n in range(4)]
    set_tensors(source, lambda tensors: tensors.update({n: torch.ones(8) for n in names}))
    assert "holds 4 tensors" in str(refusal(source))
    assert "holds 3 tensors" in str(refusal(source, ignored=[names[1]]))
    ignored = ["*.gate.bias"]
    assert refusal(source, ignored=ignored) is None
    model = load(source, ignore_tensors=ignored)
    want = logits_of(load(intact / "mixtral"), tiny_batch())
    assert torch.equal(logits_of(model, tiny_batch()), want)
    assert torch.equal(logits_of(resolve(source, ignored=ignored).load(), tiny_batch()), want)
    infos = [layer.info for layer in moe_layers(model)]
    apply_plan(model, Plan(tuple(PruneExperts(i.index, i.name, kept=(0, 1, 2)) for i in infos)))
    with caplog.at_level(logging.WARNING):
        save_checkpoint(model, out, source)
    assert "4 tensors of modules that do not know them are left out" in caplog.text
    assert refusal(out) is None and not [n for n in load_file(out / WEIGHTS) if "gate.bias" in n]


ODD = (
    "llama4",
    "granitemoehybrid",
    "jamba",
    "longcat_flash",
    "ernie4_5_moe",
    "lfm2_moe",
    "kimi_k25",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_what_transformers_writes_of_odd_families_is_taken(name: str, tmp_path: Path) -> None:
    """Fused and split tensors, towers, buffers; `python -m moe_lab.families` has every type."""
    tiny_of(name).save_pretrained(tmp_path)
    assert resolve(tmp_path).layers()
