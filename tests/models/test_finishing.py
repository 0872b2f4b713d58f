"""What makes a folder of weights a checkpoint; most of it is tested with whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from families import tiny_model

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.finishing import copy_text_files, write_configs


def test_configs_are_those_that_transformers_writes_beside_weights(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours = tmp_path / "ours"
    ours.mkdir()
    write_configs(meta_model(model.config).to(torch.bfloat16), ours)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((ours / name).read_text()) == json.loads(
            (tmp_path / "theirs" / name).read_text()
        )


def test_text_files_come_along_byte_for_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    tiny_model("mixtral").save_pretrained(source)
    target.mkdir()
    (source / "tokenizer_config.json").write_bytes(b'{"a":\r\n1}')
    copy_text_files(source, target)
    assert (target / "tokenizer_config.json").read_bytes() == b'{"a":\r\n1}'
    assert not (target / "model.safetensors").exists()
