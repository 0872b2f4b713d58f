"""Checkpoints written a file at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moe_lab.export.folder import stored_tensors, write_folder
from moe_lab.models.weight_files import size_in_bytes


def test_several_files_have_an_index_and_one_has_none(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "config.json", "notes.md"):
        (source / name).write_text('{"from": "source"}')
    files = {f"{name}.safetensors": {name: torch.arange(4.0)} for name in ("a", "b")}
    write_folder(tmp_path / "two", files.items(), {"model_type": "x"}, source)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "a.safetensors", "b": "b.safetensors"}
    assert index["metadata"]["total_size"] == 32 < size_in_bytes(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text()) == {"model_type": "x"}
    assert (tmp_path / "two" / "tokenizer.json").is_file()
    assert not (tmp_path / "two" / "notes.md").exists()
    found = stored_tensors(tmp_path / "two")
    assert found.keys() == {"a", "b"} and torch.equal(found["b"].load(), torch.arange(4.0))

    (name, tensors), *_ = files.items()
    write_folder(tmp_path / "one", [(name, tensors)], {}, source)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "a.safetensors", "config.json", "tokenizer.json",
    ]  # fmt: skip
