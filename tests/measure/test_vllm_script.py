"""What is timed in vLLM's process, on a clock that is moved by hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.measure import vllm_script
from moe_lab.measure.vllm_script import cause_of, seconds

ASKED = {
    "seed": 3, "vocabulary_size": 96, "prompt_length": 10, "requests": 4, "output_tokens": 5,
    "repeats": 3,
}  # fmt: skip


class Engine:
    """It reads 100 tokens and writes 20 in a second, and is ten times slower at first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.prompts: list[list[list[int]]] = []

    def generate(self, prompts: list[list[int]], tokens: int) -> list[int]:
        slow = 10 if len(self.prompts) < 2 else 1
        read = sum(map(len, prompts)) / 100
        self.now += slow * (read + len(prompts) * (tokens - 1) / 20)
        self.prompts.append(prompts)
        return [tokens] * len(prompts)


def test_a_prefill_and_the_decoding_behind_it_are_told_apart() -> None:
    engine = Engine()
    found = seconds(engine.generate, ASKED, lambda: engine.now)
    assert found["prefill"] == pytest.approx([0.4] * 3)  # the first round is not among them
    assert found["decode"] == pytest.approx([1.0] * 3)


def test_every_checkpoint_gets_the_same_prompts_and_no_round_those_of_another() -> None:
    one, other = Engine(), Engine()
    for engine in (one, other):
        seconds(engine.generate, ASKED, lambda engine=engine: engine.now)
    assert one.prompts == other.prompts and len(one.prompts) == 8
    assert all(one.prompts[i] == one.prompts[i + 1] for i in range(0, 8, 2))
    ids = {tuple(map(tuple, prompts)) for prompts in one.prompts}
    assert len(ids) == 4
    assert {len(prompt) for prompts in one.prompts for prompt in prompts} == {10}
    assert all(0 <= i < 96 for prompts in one.prompts for prompt in prompts for i in prompt)


def test_an_engine_that_adds_fewer_tokens_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match=r"6 tokens were asked for each prompt, and \[5"):
        seconds(lambda prompts, tokens: [min(tokens, 5)] * len(prompts), ASKED)


def test_an_error_is_told_by_what_it_came_from() -> None:
    try:
        try:
            raise KeyError("layers.2")
        except KeyError as error:
            raise RuntimeError("it failed") from error
    except RuntimeError as error:
        assert cause_of(error) == "KeyError: 'layers.2'"


def test_without_vllm_the_answer_says_so(tmp_path: Path) -> None:
    """Run as the file that it is, by a Python that has none."""
    asked, answer = tmp_path / "asked.json", tmp_path / "answer.json"
    asked.write_text(json.dumps(ASKED))
    command = [sys.executable, "-P", str(vllm_script.__file__), str(asked), str(answer)]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert json.loads(answer.read_text()) == {
        "error": "ModuleNotFoundError: No module named 'vllm'"
    }


def test_it_imports_nothing_but_the_standard_library_and_vllm() -> None:
    tree = ast.parse(Path(str(vllm_script.__file__)).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}  # fmt: skip
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"vllm"}
