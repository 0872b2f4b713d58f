"""Written checkpoints: names, bits and what they remember."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from edited_models import condense, edited, moe_indices, prune
from families import tiny_model
from safetensors.torch import load_file
from wrappers import write_wrapper

from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.saving import save_checkpoint


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_experts_are_written_one_by_one_as_engines_want_them(family: str, tmp_path: Path) -> None:
    edited(family, [prune(i, [0, 1, 4, 5]) for i in moe_indices(family)], tmp_path / "x")
    names = load_file(tmp_path / "x" / "model" / "model.safetensors")
    assert any(".experts.3." in name for name in names)
    assert not any("gate_up_proj" in name for name in names)


def test_a_checkpoint_remembers_how_much_padding_was_allowed(tmp_path: Path) -> None:
    edits = [condense(1, [5, 2, 6]), condense(2, [5, 2])]  # zeros of 16 units: 2 % of this model
    assert not edited("qwen3_moe", edits, tmp_path / "none", padding=0.0)
    assert edited("qwen3_moe", edits, tmp_path / "some", padding=0.05)
    source = tmp_path / "none" / "model"
    assert not save_checkpoint(load(source), tmp_path / "again", source).stock
    assert save_checkpoint(load(source), tmp_path / "native", source, padding=0.05).stock


def test_untouched_tensors_keep_every_bit(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    before = load_file(tmp_path / "source" / "model.safetensors")
    model = load(tmp_path / "source", dtype="float32")
    apply_plan(model, Plan((PruneExperts(2, "model.layers.2.mlp", kept=(0, 1, 2, 4, 5, 6)),)))
    save_checkpoint(model, tmp_path / "out", tmp_path / "source")
    after = load_file(tmp_path / "out" / "model.safetensors")
    untouched = [name for name in after if ".layers.2.mlp" not in name]
    assert untouched
    for name in untouched:
        assert torch.equal(after[name].to(before[name].dtype), before[name]), name


@pytest.mark.parametrize("trusted", [False, True])
def test_whatever_lies_beside_the_weights_comes_along(trusted: bool, tmp_path: Path) -> None:
    """Code of others only where a config names it."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model("mixtral").save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    auto_map = '{"auto_map": {"AutoProcessor": "processing_x.XProcessor"}}'
    texts = {
        "additional_chat_templates/rag.jinja": "{{ documents }}\n",
        "processor_config.json": auto_map if trusted else "{}",
        "vocabulary.tiktoken": "IQ== 0\n",
    }
    code = {"processing_x.py": "raise SystemExit\n", "image_x.py": "raise SystemExit\n"}
    for name, text in (texts | code).items():
        (source / name).write_text(text)
    save_checkpoint(load(source), out, source)
    expected = texts | (code if trusted else {})
    assert {name: (out / name).read_text() for name in expected} == expected
    assert trusted or not list(out.glob("*.py"))


def test_parts_of_a_config_keep_the_dtypes_that_they_had(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_wrapper("aria", source)
    told = json.loads((source / "config.json").read_text())
    told["text_config"]["dtype"] = told["dtype"] = "bfloat16"
    told["vision_config"].pop("dtype", None)
    (source / "config.json").write_text(json.dumps(told))
    save_checkpoint(load(source, dtype="float32"), out, source)
    made = json.loads((out / "config.json").read_text())
    assert made["dtype"] == made["text_config"]["dtype"] == "bfloat16"
    assert "dtype" not in made["vision_config"]
