"""An environment with something that is called vLLM: it takes time, and serves nothing.

How long it takes follows from the size of the checkpoint, so that ratios are known; what it was
asked, in which process, stands in a file. Tests of all that is around vLLM use it; that vLLM itself
is measured only vLLM can show.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CODE = """
import json, os, time
from pathlib import Path

HOME = Path(__file__).parent


class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0, True, False)
        self.max_tokens = max_tokens


class Answer:
    def __init__(self, name, number):
        self.request_id, self.token_ids, self.outputs = name, [7] * number, [self]


class LLM:
    def __init__(self, **given):
        with (HOME / "asked.jsonl").open("a") as file:
            known = ("TORCHDYNAMO_DISABLE", "VLLM_CPU_KVCACHE_SPACE", "PYTHONHASHSEED")
            variables = {name: os.environ.get(name) for name in known}
            file.write(json.dumps({"pid": os.getpid(), "variables": variables} | given) + "\\n")
        told = json.loads((HOME / "behaviour.json").read_text())
        if told.get("refuses"):
            try:
                raise KeyError("layers.2.mlp.down_proj.weight")
            except KeyError as error:
                raise RuntimeError("Engine core initialization failed") from error
        if told.get("dies"):
            print("out of memory", flush=True)
            os._exit(3)
        self.short = told.get("short", 0)
        self.size = (Path(given["model"]) / "model.safetensors").stat().st_size

        self.llm_engine, self.running = self, {}

    def add_request(self, name, prompt, sampling):
        self.running[name] = [len(prompt["prompt_token_ids"]), 0, sampling.max_tokens - self.short]

    def has_unfinished_requests(self):
        return any(made < wanted for _, made, wanted in self.running.values())

    def step(self):
        first = [length for length, made, _ in self.running.values() if not made]
        time.sleep(self.size * 1e-9 * (sum(first) or 8 * len(self.running)))
        for request in self.running.values():
            request[1] += 1
        made = [Answer(name, made) for name, (_, made, _) in self.running.items()]
        if not self.has_unfinished_requests():
            self.running = {}
        return made
"""


@dataclass(frozen=True)
class FakeVllm:
    """The Python of such an environment, and where it writes what it was asked."""

    python: Path
    package: Path

    def asked(self) -> list[dict[str, Any]]:
        """The arguments of each engine that was started, with its process, in order."""
        lines = (self.package / "asked.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def fake_vllm(
    folder: Path, name: str = "vllm", version: str = "0.32.0", plugin: bool = False, **told: Any
) -> FakeVllm:
    """told: refuses, dies, or short by so many tokens."""
    packages = {name: version} | ({"moe_lab_vllm": "0.1"} if plugin else {})
    for package, number in packages.items():
        stem = f"{package.replace('-', '_')}-{number}"
        (info := folder / "site" / f"{stem}.dist-info").mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {package}\nVersion: {number}\n")
    (home := folder / "site" / "vllm").mkdir(exist_ok=True)
    (home / "__init__.py").write_text(CODE)
    (home / "behaviour.json").write_text(json.dumps(told))
    python = folder / "python"
    site = folder / "site"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return FakeVllm(python, home)
