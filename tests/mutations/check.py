"""Is a wrong formula noticed, and is a mended one computed again?

    python tests/mutations/check.py            all of mutations.yaml, some ten minutes
    python tests/mutations/check.py reap kl    those whose function or file has one of these words

Each entry changes one operator or constant of a function that decides a result, in a copy of the
code. Then a small job, whose results are in the store already, must get another key for some of
them, and the test that is named must fail. Ends with 1 where one of the two does not happen.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
running = importlib.import_module("running")
LIST = Path(__file__).with_name("mutations.yaml")
COPIED = ("moe_lab", "conf", "tests", "docs", "run.py", "pyproject.toml")
QUIET = running.OFFLINE | {"MKL_CBWR": "AVX2"}
# The tiny checkpoint and texts of the tests, in a folder of their own.
MAKE_INPUTS = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/support")
from running import byte_tokenizer, write_checkpoint, write_texts
home = Path(sys.argv[1])
write_checkpoint(home / "model", byte_tokenizer())
write_texts(home / "text.jsonl")
"""
# Words for options that many entries need.
SHORT = {
    "+tune": "calibration@finetune.phases.lm.data=files "
    "finetune.phases.lm.data.files=[{home}/text.jsonl] finetune.phases.lm.data.num_samples=8 "
    "calibration@finetune.phases.lm.validation=files "
    "finetune.phases.lm.validation.files=[{home}/text.jsonl] "
    "finetune.phases.lm.validation.num_samples=4 +finetune.phases.lm.num_steps=2",
    "+held_out": "eval=perplexity calibration@eval.held_out=files "
    "eval.held_out.files=[{home}/text.jsonl] eval.held_out.num_samples=4",
    "+speed": "measure=speed measure.repeats=1 measure.prompt_length=8 measure.decode_tokens=1",
}


@dataclass(frozen=True)
class Mutation:
    """One change: `before`, once in the function, becomes `after`.

    options: of the job whose keys are looked at; test: what of the tests must fail.
    """

    file: str
    function: str
    before: str
    after: str
    options: str
    test: str

    def apply(self, root: Path) -> str:
        """Change the file below `root`; its text as it was."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        start, end = self.place(text)
        changed = text[start:end].replace(self.before, self.after)
        path.write_text(text[:start] + changed + text[end:], encoding="utf-8")
        return text

    def place(self, text: str) -> tuple[int, int]:
        """Where the function stands in the text of its file; `before` is there once."""
        body: Sequence[Any] = ast.parse(text).body
        node: Any = None
        for name in self.function.split("."):
            node = next(one for one in body if getattr(one, "name", None) == name)
            body = node.body
        lines = text.splitlines(keepends=True)
        start = sum(map(len, lines[: node.lineno - 1]))
        end = sum(map(len, lines[: node.end_lineno]))
        number = text[start:end].count(self.before)
        if number != 1:
            raise ValueError(f"{self.file}: {self.function} has {self.before!r} {number} times")
        return start, end


def mutations() -> list[Mutation]:
    """All of the list."""
    return [Mutation(**one) for one in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


class Workplace:
    """A copy of the code, inputs, and a store with what jobs of the unchanged code left."""

    def __init__(self, home: Path):
        self.home, self.code, self.known = home, home / "code", dict[str, dict[str, str]]()
        self.code.mkdir()
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, self.code / name)
        self.python("-c", MAKE_INPUTS, str(home))

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python in the copy."""
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.code, capture_output=True, text=True,
            env=os.environ | QUIET | {"PYTHONPATH": str(self.code)}, check=False,
        )  # fmt: skip

    def keys(self, options: str) -> dict[str, str]:
        """The results of a job, `<kind>/<key>` by stage, also where it fails on the way."""
        run = self.home / "run"
        shutil.rmtree(run, ignore_errors=True)
        for word, meant in SHORT.items():
            options = options.replace(word, meant)
        small = running.small_options(self.home / "model", self.home / "text.jsonl")
        words = [*small, *running.QUICK, *shlex.split(options.format(home=self.home))]
        done = self.python("run.py", *words, f"store={self.home}/store", f"run_dir={run}")
        report = json.loads((run / "report.json").read_text()) if run.is_dir() else {}
        if not report:
            raise RuntimeError(done.stdout + done.stderr)
        return {key: value for key, value in report.items() if key.startswith("artifact/")} | {
            "status": report["status"]
        }

    def before(self, options: str) -> dict[str, str]:
        """The same of the unchanged code, once."""
        if options not in self.known:
            self.known[options] = self.keys(options)
            if self.known[options]["status"] != "ok":
                raise RuntimeError(f"the job {options!r} fails without any change")
        return self.known[options]

    def check(self, one: Mutation) -> tuple[list[str], bool]:
        """The stages that get another key, and whether the test fails."""
        before = self.before(one.options)
        text = one.apply(self.code)
        try:
            after = self.keys(one.options)
            tested = self.python(
                "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *one.test.split()
            )
        finally:
            (self.code / one.file).write_text(text, encoding="utf-8")
        stages = [key for key in after if key != "status" and after[key] != before.get(key)]
        return [key.removeprefix("artifact/") for key in stages], tested.returncode == 1


def work(chosen: Sequence[Mutation]) -> list[tuple[Mutation, list[str], bool]]:
    """Check some, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        place, results = Workplace(Path(folder)), []
        for one in chosen:
            stages, failed = place.check(one)
            good = "ok " if stages and failed else "NOT"
            keys, test = ", ".join(stages) or "no key", "fails" if failed else "DOES NOT FAIL"
            print(f"{good} {one.file} {one.function}: {keys}; {one.test} {test}", flush=True)
            results.append((one, stages, failed))
        return results


def main(words: Sequence[str]) -> int:
    """Check those with one of the words, all without any."""
    chosen = [
        one
        for one in mutations()
        if not words or any(word in f"{one.file} {one.function}" for word in words)
    ]
    halves = [chosen[start::2] for start in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        results = [result for half in pool.map(work, halves) for result in half]
    good = sum(bool(stages) and failed for _, stages, failed in results)
    print(f"{good} of {len(results)} changes were noticed by a key and by a test")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
