"""GGUF files: converted by the public converter, and loaded in llama.cpp."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenised import SHIPPED, random_model

from moe_lab.export import gguf_converter
from moe_lab.export.gguf import export, export_gguf
from moe_lab.export.given import Given
from moe_lab.export.llama_cpp import logprobs_and_tokens
from moe_lab.models.checkpoint import load
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.models.saving import save_checkpoint
from moe_lab.types import UserError


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


def test_what_llama_cpp_does_not_load_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_converter, "LITE_LAYERS", (4,))
    folder = random_model(tmp_path / "one", "deepseek_v2")
    with pytest.raises(UserError, match=r"does not load .*key not found.*q_lora_rank; removed"):
        export_gguf(folder, tmp_path / "one.gguf", pre_tokenizer="refact")
    assert not (tmp_path / "one.gguf").exists()


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
