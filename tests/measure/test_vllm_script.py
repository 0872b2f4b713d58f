"""What is timed in vLLM's process, on a clock that is moved by hand."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_lab.measure import vllm_script
from moe_lab.measure.vllm_script import cause_of, seconds

ASKED = {
    "seed": 3, "vocabulary_size": 96, "prompt_length": 10, "requests": 4, "output_tokens": 5,
    "repeats": 3,
}  # fmt: skip


class Engine:
    """It reads 100 tokens and takes a step in a quarter of a second, ten times slower at first."""

    def __init__(self, short: int = 0) -> None:
        self.now, self.short = 0.0, short
        self.prompts: list[list[list[int]]] = []

    def steps(self, prompts: list[list[int]], number: int) -> Iterator[list[int]]:
        slow = 1 if self.prompts else 10
        self.prompts.append(prompts)
        for at, prompt in enumerate(prompts):  # first tokens come one after another
            self.now += slow * len(prompt) / 100
            yield [int(one <= at) for one in range(len(prompts))]
        for count in range(2, number + 1 - self.short):
            self.now += slow * (5.0 if count == 4 else 0.25)  # one step is held up
            yield [count] * len(prompts)
            yield [count] * len(prompts)  # a step that gives nothing


def test_a_prefill_and_the_steps_behind_it_are_told_apart() -> None:
    engine = Engine()
    found = seconds(engine.steps, ASKED, lambda: engine.now)
    assert found["prefill"] == pytest.approx([0.4] * 3)  # the first round is not among them
    assert found["decode"] == pytest.approx([0.25] * 3)


def test_every_checkpoint_gets_the_same_prompts_and_no_round_those_of_another() -> None:
    one, other = Engine(), Engine()
    for engine in (one, other):
        seconds(engine.steps, ASKED, lambda engine=engine: engine.now)
    assert one.prompts == other.prompts and len(one.prompts) == 4
    assert len({tuple(map(tuple, prompts)) for prompts in one.prompts}) == 4
    assert {len(prompts) for prompts in one.prompts} == {4}
    assert {len(prompt) for prompts in one.prompts for prompt in prompts} == {10}
    assert all(0 <= i < 96 for prompts in one.prompts for prompt in prompts for i in prompt)


def test_an_engine_that_adds_fewer_tokens_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match=r"6 tokens were asked for each prompt, not 5"):
        seconds(Engine(short=1).steps, ASKED)


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
