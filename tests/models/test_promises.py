"""Checkpoints whose config says what their folder has not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edited_models import in_fresh_process
from families import tiny_batch, tiny_model
from mtp_checkpoints import write_with_mtp
from safetensors.torch import load_file, save_file

from moe_lab.models import finishing, promises
from moe_lab.models.checkpoint import load
from moe_lab.models.own_config import own_values
from moe_lab.models.promises import PromiseBroken, broken_promises, check_promises
from moe_lab.models.saving import save_checkpoint


def written(folder: Path, family: str = "deepseek_v3", **more: Any) -> Path:
    """A tiny checkpoint with further fields in its config."""
    tiny_model(family).save_pretrained(folder)
    return said(folder, **({"num_nextn_predict_layers": 0} | more))


def said(folder: Path, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"num_nextn_predict_layers": 1}, "promises MTP layers (num_nextn_predict_layers=1)"),
        ({"num_mtp_layers": 2}, "promises MTP layers (num_mtp_layers=2)"),
        ({"use_mtp": True, "num_mtp_modules": 3}, "(num_mtp_modules=3, use_mtp=True)"),
        (
            {"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModel": "b/c--m.X"}},
            "config.json names configuration_x.py (auto_map), which is not there",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "none of its tensors is quantised"),
        ({"tie_word_embeddings": True}, "lm_head.weight is another tensor"),
        ({"num_experts": 6}, "num_experts=6, num_local_experts=8, n_routed_experts=8"),
    ],
)
def test_what_is_promised_and_not_there(more: dict, told: str, tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", num_local_experts=8)
    assert list(broken_promises(whole)) == []
    broken = written(tmp_path / "broken", num_local_experts=8, **more)
    assert [told in one for one in broken_promises(broken)] == [True]
    with pytest.raises(PromiseBroken, match="Please report this"):
        check_promises(broken, whole)


def test_what_the_source_did_not_keep_either_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    source = written(tmp_path / "source", **named)
    with caplog.at_level(logging.WARNING):
        save_checkpoint(load(source), tmp_path / "out", source)
    assert "as at its source, config.json names configuration_x.py (auto_map)" in caplog.text


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "mimo_v2_flash"])
def test_mtp_layers_that_are_there_are_found(family: str, tmp_path: Path) -> None:
    write_with_mtp(family, tmp_path)
    assert any(json.loads((tmp_path / "config.json").read_text()).get(field)
               for field in promises.MTP_COUNTS)  # fmt: skip
    assert list(broken_promises(tmp_path)) == []


@pytest.mark.parametrize("inside", [False, True])
def test_layers_of_an_own_form_and_of_a_wrapper_are_read_inside(
    inside: bool, tmp_path: Path
) -> None:
    folder = written(tmp_path, num_nextn_predict_layers=1)
    values = json.loads((folder / "config.json").read_text())
    wrapper = {"model_type": "x", "text_config": values}
    other = own_values(values | {"moe_lab": {"layers": {}}}) if inside else wrapper
    (folder / "config.json").write_text(json.dumps(other))
    assert any("promises MTP layers" in one for one in broken_promises(folder))


def test_a_tied_head_that_a_family_does_not_know_is_said_untied(tmp_path: Path) -> None:
    """nemotron_h's config may say so, and transformers keeps two tensors; an engine would tie."""
    from moe_lab.families.tiny import tiny_model as tiny_of

    model, batch = tiny_of("nemotron_h"), tiny_batch()
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path / "source")
    assert any("another tensor" in one for one in broken_promises(tmp_path / "source"))
    model = load(tmp_path / "source")
    (folder := tmp_path / "x").mkdir()
    save_checkpoint(model, folder / "model", tmp_path / "source")
    assert list(broken_promises(folder / "model")) == []
    save_file(batch | {"logits": model(**batch).logits.detach()}, folder / "expected.safetensors")
    assert in_fresh_process("stock", [folder])["x"] < 1e-5


TEXTS = {
    "generation_config.json": '{"do_sample": true, "top_k": 20, "eos_token_id": [2, 3]}',
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": null}',
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\r\na b\n",
    "tokenizer.model": "model",
    "tekken.json": "{}",
    "chat_template.jinja": "{{ messages }}\n",
    "chat_template.json": "{}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "preprocessor_config.json": '{"size": 1}',
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
}


def test_files_beside_the_weights_are_the_source_s_to_the_byte(tmp_path: Path) -> None:
    source, out = written(tmp_path / "source"), tmp_path / "out"
    (source / "additional_chat_templates").mkdir()
    for name, text in TEXTS.items():
        (source / name).write_bytes(text.encode())
    save_checkpoint(load(source), out, source)
    for name, text in TEXTS.items():
        assert (out / name).read_bytes() == text.encode(), name


def test_what_speaks_of_weights_in_another_form_does_not_come_along(tmp_path: Path) -> None:
    """An engine would look for Mistral's files, for packed weights, or for another index's."""
    source, out = written(tmp_path / "source"), tmp_path / "out"
    names = ("params.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
             "consolidated.safetensors.index.json", "model.safetensors.index.fp16.json",
             "pytorch_model.bin.index.json")  # fmt: skip
    for name in names:
        (source / name).write_text("{}")
    save_checkpoint(load(source), out, source)
    assert not [name for name in names if (out / name).exists()]


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_file_that_does_not_come_along_is_an_error(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    copy: Callable[[Path, Path], None] = finishing.copy_text_files

    def careless(source: Path, folder: Path) -> None:
        copy(source, folder)
        target = folder / "chat_template.jinja"
        target.unlink() if damage == "lost" else target.write_text("{{ messages  }}")

    monkeypatch.setattr(finishing, "copy_text_files", careless)
    with pytest.raises(PromiseBroken, match=r"chat_template.jinja is not that of"):
        save_checkpoint(load(source), tmp_path / "out", source)


def test_a_head_of_the_same_values_keeps_the_promise(tmp_path: Path) -> None:
    folder = written(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert list(broken_promises(folder)) == []
