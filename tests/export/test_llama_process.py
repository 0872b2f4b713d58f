"""The process that llama.cpp runs in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from moe_lab.export.llama_cpp import PROCESS


def test_it_needs_nothing_of_ours(dense_gguf: Path, tmp_path: Path) -> None:
    job = {"path": str(dense_gguf), "prompts": [[1, 5, 9]], "num_tokens": 2, "num_logprobs": 3,
           "texts": []}  # fmt: skip
    script = f"import runpy, sys; runpy.run_path({str(PROCESS)!r}, run_name='__main__'); print(sorted(m for m in sys.modules if m in ('torch', 'transformers', 'moe_lab')))"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path / "answer.json")],
        input=json.dumps(job), capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
    said = json.loads((tmp_path / "answer.json").read_text())
    assert len(said["logprobs"][0]) == 3 and len(said["tokens"][0]) == 2 and not said["token_ids"]


def test_without_a_prompt_texts_are_tokenised(dense_gguf: Path, tmp_path: Path) -> None:
    job = {"path": str(dense_gguf), "prompts": [], "num_tokens": 1, "num_logprobs": 1,
           "texts": ["a b", ""]}  # fmt: skip
    out = tmp_path / "answer.json"
    command = [sys.executable, "-P", str(PROCESS), str(out)]
    subprocess.run(command, input=json.dumps(job), text=True, check=True, capture_output=True)
    said = json.loads(out.read_text())
    assert len(said["token_ids"][0]) > 1 and said["token_ids"][1] == [] and said["tokens"] == []
