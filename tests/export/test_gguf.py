"""GGUF files: converted by the public converter, and loaded in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
from edited_models import edited

from moe_lab.export.gguf import convert, export_gguf
from moe_lab.files import PACKAGE
from moe_lab.types import UserError


def test_tied_embeddings_are_written_as_an_output_matrix(tmp_path: Path) -> None:
    """llama.cpp does not load a qwen2_moe without one."""
    (told,) = export_gguf(
        PACKAGE / "checkpoints" / "tiny_qwen2_moe", tmp_path / "one.gguf", pre_tokenizer="refact"
    )
    assert "144 of 144 greedy tokens agree" in told and (tmp_path / "one.gguf").is_file()


def test_dense_layers_are_refused_where_llama_cpp_knows_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers \[0\] of .* are dense, and llama\.cpp knows no"):
        export_gguf(PACKAGE / "checkpoints" / "tiny_deepseek", tmp_path / "one.gguf")
    assert not list(tmp_path.iterdir())


def test_an_unknown_tokenizer_is_stated_not_guessed(shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.gguf"
    with pytest.raises(UserError, match=r"state it with --pre-tokenizer NAME.* llama-bpe, "):
        export_gguf(shipped, out)
    with pytest.raises(UserError, match="--pre-tokenizer refract does not exist; there are "):
        export_gguf(shipped, out, pre_tokenizer="refract")
    with pytest.raises(UserError, match=r"splits text into other tokens than .*; removed"):
        export_gguf(shipped, out, pre_tokenizer="llama-bpe")
    assert not list(tmp_path.iterdir())


def test_the_converter_itself_refuses_our_own_form(tmp_path: Path) -> None:
    edits = [{"index": index, "edit": "prune", "kept": (0, 1, 2, 3)[: 4 - index % 2]}
             for index in range(4)]  # fmt: skip
    assert not edited("mixtral", edits, tmp_path / "own")
    with pytest.raises(UserError, match=r"moe_lab's own form .* reads families' own forms only"):
        export_gguf(tmp_path / "own" / "model", tmp_path / "one.gguf")
    with pytest.raises(UserError, match=r"llama\.cpp's converter refuses .*model: \w+Error: .+"):
        convert(tmp_path / "own" / "model", tmp_path / "one.gguf")
