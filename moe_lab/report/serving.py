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
# The engines by their names in the matrix, and what they are called.
ENGINES = {
    "transformers": "transformers",
    "vllm": "vLLM",
    "vllm-plugin": "vLLM with the plugin",
    "llama.cpp": "llama.cpp",
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
        found = [] if self.difference is None else [f"{self.difference:.0e}"]
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
        first = next(iter(self.versions[engine].values()))
        return f"{ENGINES[engine]} {first}"


def _told(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(cell).items() if value or value == 0}


def where_it_runs(matrix: Matrix, family: str, form: str) -> dict[str, str]:
    """What each engine of the matrix makes of a checkpoint of this family and form, in words.

    The keys are engines; "not run" where the matrix has no such cell.
    """
    return {engine: _said(matrix, engine, family, form) for engine in ENGINES}


def runs_right(matrix: Matrix, engine: str, family: str, form: str) -> bool:
    """Whether the matrix has such checkpoints, and the engine made all of them right."""
    return {cell.verdict for cell in _alike(matrix, engine, family, form)} == {"right"}


def _alike(matrix: Matrix, engine: str, family: str, form: str) -> list[Cell]:
    wanted = (engine, family, form)
    return [one for one in matrix.cells if (one.engine, one.family, one.form) == wanted]


def _said(matrix: Matrix, engine: str, family: str, form: str) -> str:
    cells = _alike(matrix, engine, family, form)
    if not cells:
        return f"{ENGINES[engine]}: not run"
    verdict = next(one for one in VERDICT_WORDS if one in {cell.verdict for cell in cells})
    those = [cell for cell in cells if cell.verdict == verdict]
    worst = max(those, key=lambda cell: cell.difference or 0)
    share = "" if len(those) == len(cells) else f" for {len(those)} of {len(cells)}"
    reason = f": {worst.detail}" if verdict in ("refused", "crashed") and worst.detail else ""
    return f"{matrix.version(engine)}: {worst.words}{share}{reason}"


def serving_line(family: str, form: str) -> str:
    """The same in one line, of the shipped matrix: the key `<variant>/serving` of a report."""
    said = where_it_runs(Matrix.read(), family, form)
    return f"{family}, {form}: " + "; ".join(said.values())
