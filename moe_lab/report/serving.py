"""The matrix of serving engines: which made right, refused or garbled what moe_lab writes.

Shipped with the package, as `python -m moe_lab.serving --write` found it. docs/serving.md, the key
`<variant>/serving` of report.json and the model cards are made from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_lab.files import PACKAGE

MATRIX = PACKAGE / "serving" / "matrix.json"
Verdict = Literal["right", "refused", "crashed", "own fault", "silent"]
# From the worst: what is said of several checkpoints is the worst of theirs.
VERDICT_WORDS: dict[Verdict, str] = {
    "silent": "SILENTLY WRONG",
    "own fault": "engine's own fault (dense too)",
    "crashed": "crashed",
    "refused": "refused",
    "right": "right",
}
# The engines by their names in the matrix, and what they are called, with their version.
ENGINES = {
    "transformers": "transformers {}",
    "vllm": "vLLM {}",
    "vllm-plugin": "vLLM {} with the plugin",
    "llama.cpp": "llama.cpp {}",
}
# How a checkpoint is served; what a setting of the matrix adds.
COMMANDS = {
    "vllm": "vllm serve <this folder>",
    "vllm-plugin": "pip install --no-deps ./plugins/vllm  # of moe_lab's repository, beside vLLM\n"
    "vllm serve <this folder>",
    "llama.cpp": "python -m moe_lab.export <this folder> --to gguf --out model.gguf",
}
SETTING_ARGUMENTS = {
    "custom_ops none": """ --compilation-config '{"custom_ops": ["none"]}'""",
}
# Not run; found by reading an engine's source, by family and a word of the form.
AS_READ = {
    ("qwen2_moe", "dense layers"): "SGLang: not run. As read in its source, its Qwen2-MoE ignores "
    "`mlp_only_layers` without an error: do not serve this checkpoint with it before checking",
}


@dataclass(frozen=True)
class Cell:
    """What an engine made of a checkpoint.

    subject: the model that it comes from; made: by what; family, form: as `models/form_kinds.py`
    says. difference: the largest of a next token's logprob from transformers in float32; tokens:
    how many of the greedy ones agree, as "48/48"; setting: with which the engine's dense model is
    right, where it is not by itself; detail: the refusal in a line.
    """

    subject: str
    made: str
    family: str
    form: str
    engine: str
    verdict: Verdict
    difference: float | None = None
    tokens: str = ""
    setting: str = ""
    detail: str = ""

    @property
    def words(self) -> str:
        """The verdict with its figures, without the reason of a refusal."""
        found = [] if self.difference is None else [f"{self.difference:.0e}".replace("0e+00", "0")]
        found += [self.tokens] if self.tokens else []
        said = VERDICT_WORDS[self.verdict] + (f" ({', '.join(found)})" if found else "")
        return f"{said} with {self.setting}" if self.setting else said


@dataclass(frozen=True)
class Matrix:
    """All cells, and of each engine the versions with which they were found."""

    versions: dict[str, dict[str, str]]
    cells: tuple[Cell, ...]

    def to_text(self) -> str:
        """As JSON, a cell a line, so that two can be diffed."""
        rows = (json.dumps(_told(cell), ensure_ascii=False) for cell in self.cells)
        versions = json.dumps(self.versions, ensure_ascii=False, indent=1)
        return f'{{"versions": {versions},\n"cells": [\n' + ",\n".join(rows) + "\n]}\n"

    @classmethod
    def read(cls, path: Path = MATRIX) -> Matrix:
        """The inverse of `to_text`."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(values["versions"], tuple(Cell(**one) for one in values["cells"]))

    def with_cells(self, cells: Iterable[Cell], versions: Mapping[str, dict[str, str]]) -> Matrix:
        """With all cells of these engines anew."""
        kept = [cell for cell in self.cells if cell.engine not in versions]
        return Matrix(self.versions | dict(versions), (*kept, *cells))

    def version(self, engine: str) -> str:
        """An engine's name with its version."""
        return engine_title(engine, next(iter(self.versions[engine].values())))


def engine_title(engine: str, version: str = "") -> str:
    """What an engine is called, with its version or without."""
    return " ".join(ENGINES[engine].format(version).split())


def _told(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(cell).items() if value or value == 0}


@dataclass(frozen=True)
class WhereItRuns:
    """What the matrix says of a checkpoint of a family and form (`models/form_kinds.py`)."""

    matrix: Matrix
    family: str
    form: str

    def lines(self) -> dict[str, str]:
        """By engine, what it makes of it, in words; "not run" where there is no such cell."""
        return {engine: self._line(engine) for engine in ENGINES}

    def commands(self) -> list[str]:
        """How it is served by the engines that are right; without the plugin where none is due."""
        right = [engine for engine in COMMANDS if self._verdict(engine) == "right"]
        if "vllm" in right and "vllm-plugin" in right:
            right.remove("vllm-plugin")
        return [COMMANDS[engine] + self._arguments(engine) for engine in right]

    def warnings(self) -> list[str]:
        """With what it must not be served, and why."""
        found = [
            f"Do not serve it with {self.matrix.version(engine)}: what comes out is wrong, without "
            "an error"
            for engine in self.matrix.versions
            if self._verdict(engine) in ("silent", "own fault")
        ]
        words = self.form.split(", ")
        found += [said for (family, word), said in AS_READ.items()
                  if family == self.family and word in words]  # fmt: skip
        return found

    def _cells(self, engine: str) -> list[Cell]:
        wanted = (engine, self.family, self.form)
        return [one for one in self.matrix.cells if (one.engine, one.family, one.form) == wanted]

    def _verdict(self, engine: str) -> Verdict | None:
        """The worst of all such checkpoints'; None where there are none."""
        there = {cell.verdict for cell in self._cells(engine)}
        return next((one for one in VERDICT_WORDS if one in there), None)

    def _arguments(self, engine: str) -> str:
        settings = {cell.setting for cell in self._cells(engine) if cell.setting}
        return "".join(SETTING_ARGUMENTS.get(name, "") for name in sorted(settings))

    def _line(self, engine: str) -> str:
        cells, verdict = self._cells(engine), self._verdict(engine)
        if verdict is None:
            return f"{engine_title(engine)}: not run"
        those = [cell for cell in cells if cell.verdict == verdict]
        worst = max(those, key=lambda cell: cell.difference or 0)
        share = "" if len(those) == len(cells) else f", {len(those)} of {len(cells)} checkpoints"
        told = verdict in ("refused", "crashed") and worst.detail
        reason = f": {worst.detail}" if told else ""
        return f"{self.matrix.version(engine)}: {worst.words}{share}{reason}"


def where_it_runs(family: str, form: str) -> WhereItRuns:
    """What the shipped matrix says of a checkpoint."""
    return WhereItRuns(Matrix.read(), family, form)
