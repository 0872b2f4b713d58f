"""Checkpoints by their headers alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from families import tiny_model
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors import safe_open

from moe_lab.models import headers
from moe_lab.models.checkpoint import resolve
from moe_lab.models.headers import described_checkpoint, write_header
from moe_lab.models.stored import stored_in
from moe_lab.types import UserError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "original", max_shard_size="40KB")
    return tmp_path / "original"


def hub_metadata(folder: Path) -> SafetensorsRepoMetadata:
    """What the hub's client gives for a checkpoint of this content."""
    files = {}
    for file in folder.glob("*.safetensors"):
        tensors, begin = {}, 0
        for one in sorted(stored_in(file), key=lambda one: one.key):
            end = begin + one.num_bytes
            tensors[one.key] = TensorInfo(one.kind, list(one.shape), (begin, end))
            begin = end
        files[file.name] = SafetensorsFileMetadata({"format": "pt"}, tensors)
    index = json.loads((folder / headers.INDEX).read_text())
    return SafetensorsRepoMetadata(index["metadata"], True, index["weight_map"], files)


def test_a_header_before_a_hole(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = 10**10
    write_header(file, {"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}})
    assert file.stat().st_size > size
    assert file.stat().st_blocks * 512 < 2**20
    with safe_open(file, "pt") as opened:
        assert opened.get_slice("a").get_shape() == [size // 2]


def test_a_folder_is_itself(checkpoint: Path, tmp_path: Path) -> None:
    assert described_checkpoint(str(checkpoint), None, "auto", (), tmp_path) == resolve(checkpoint)
    shipped = described_checkpoint("shipped:tiny_mixtral", None, "float32", (), tmp_path)
    assert shipped.path.name == "tiny_mixtral"


def test_of_the_hub_config_and_headers_are_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, file: str, revision: str | None) -> str:
        asked.append((name, file, revision))
        return str(checkpoint / file)

    def nothing(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(
        huggingface_hub, "get_safetensors_metadata", lambda *_, **__: hub_metadata(checkpoint)
    )
    found = described_checkpoint("owner/name", "main", "auto", (), tmp_path / "home")
    assert asked == [("owner/name", "config.json", "main")]
    told, real = found.layers(), resolve(checkpoint).layers()
    assert [one.model_parameters for one in told] == [one.model_parameters for one in real]
    assert told[0].model_bytes == pytest.approx(real[0].model_bytes, rel=0.05)
    sizes = [file.stat().st_size for file in found.path.glob("*.safetensors")]
    assert sum(sizes) == pytest.approx(
        sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")), rel=0.05
    )


def test_without_a_network_that_is_said(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match="the hub did not give its config and headers") as told:
        described_checkpoint("owner/no-such-model", None, "auto", (), tmp_path)
    assert "model.path=<folder>" in str(told.value)
    with pytest.raises(UserError, match="neither a folder here nor a hub id"):
        described_checkpoint("/no/such/folder", None, "auto", (), tmp_path)
