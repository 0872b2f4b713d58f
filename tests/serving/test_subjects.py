"""The models that are served: of sizes that engines take, drawn from fixed seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_lab.models.checkpoint import Checkpoint
from moe_lab.serving.subjects import RANDOM, Subject, subjects


def test_three_shipped_and_eight_random() -> None:
    names = [one.name for one in subjects()]
    assert names[:3] == ["tiny_mixtral", "tiny_qwen2_moe", "tiny_deepseek"]
    assert names[3:] == [f"random {name}" for name in RANDOM] and len(RANDOM) == 8
    assert subjects()[2].model_type == "qwen2_moe"


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_a_random_one_is_the_same_each_time(model_type: str, tmp_path: Path) -> None:
    subject = Subject(f"random {model_type}", model_type, random=True)
    one, other = (subject.write(tmp_path / name) for name in ("one", "other"))
    tensors = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    checkpoint = Checkpoint(one)
    assert checkpoint.config.vocab_size >= len(checkpoint.tokenizer())
    assert checkpoint.layers()[0].family == model_type


def test_a_shipped_one_is_not_copied(tmp_path: Path) -> None:
    folder = subjects()[0].write(tmp_path / "none")
    assert folder.name == "tiny_mixtral" and not (tmp_path / "none").exists()
