"""docs/faults.md: the figures of what `make faults` tried, part by part.

A part is a file of tests/faults/; those that were not run keep the figures of their last run, in
docs/faults.json, from which the page's tables are written anew.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

START, END = "<!-- figures: made by make faults -->", "<!-- /figures -->"


@dataclass
class Recorded:
    """What the tests of a session gave, part by part and test by test."""

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    parts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failing: dict[str, bool] = field(default_factory=dict)

    def add(self, report: pytest.TestReport) -> None:
        """Take in a test's phase; one that counts nothing itself is one case."""
        part = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_")
        words = re.split(r"\[|::", report.nodeid)[1].removeprefix("test_").replace("_", " ")
        row = self.parts.setdefault(part, {}).setdefault(
            words, {"tried": 0, "right": 0, "left": [], "notes": {}}
        )
        self.seconds[part] = self.seconds.get(part, 0.0) + report.duration
        if report.skipped:
            return
        if report.when == "call" or report.failed:
            count = self.failed if report.failed else self.passed
            count[part] = count.get(part, 0) + 1
        if report.when == "call" or report.failed:
            self.failing[report.nodeid] = report.failed or self.failing.get(report.nodeid, False)
        if report.when == "teardown" and report.nodeid in self.failing:
            tallies = [value for name, value in report.user_properties if name == "faults"]
            tally = tallies[0] if tallies else {"tried": 1, "right": 1, "left": [], "notes": {}}
            for key in ("tried", "right", "left"):
                row[key] += tally[key]
            for key, value in tally["notes"].items():  # counts are added up
                known = row["notes"].get(key, "0")
                counts = value.isdecimal() and known.isdecimal()
                row["notes"][key] = str(int(known) + int(value)) if counts else value
            if self.failing[report.nodeid] and not tally["left"]:
                row["right"] -= not tallies
                row["tried"] += bool(tallies)
                row["left"].append(report.nodeid.partition("::")[2])

    def write(self, page: Path, commit: str) -> None:
        """Bring the page and its data to what was seen."""
        data = page.with_suffix(".json")
        known = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}
        for part, rows in self.parts.items():
            failed, passed = self.failed.get(part, 0), self.passed.get(part, 0)
            said = f"{passed} passed" + (f", {failed} failed" if failed else "")
            known[part] = {
                "date": self.started.date().isoformat(),
                "commit": commit[:12] + commit[40:],
                "output": f"{said} in {self.seconds[part] / 60:.1f} minutes of work",
                "tests": {name: row for name, row in rows.items() if row["tried"]},
            }
        data.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        text = page.read_text(encoding="utf-8")
        before, after = text.partition(START)[0], text.partition(END)[2]
        page.write_text(f"{before}{START}\n{tables(known)}{END}{after}", encoding="utf-8")


def tables(parts: dict[str, Any]) -> str:
    """All figures in Markdown: one table, and what is left in words."""
    lines = ["| part | what was tried | cases | right | left |", "| --- | --- | --- | --- | --- |"]
    for part, told in sorted(parts.items()):
        for name, row in told["tests"].items():
            left = row["tried"] - row["right"]
            notes = [f"{key}: {value}" for key, value in row["notes"].items()]
            said = f"{name} ({notes[0]})" if len(notes) == 1 else name
            cells = (part.replace("_", " "), said, row["tried"], row["right"], left)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    every = [row for told in parts.values() for row in told["tests"].values()]
    tried, right = (sum(row[key] for row in every) for key in ("tried", "right"))
    lines += [f"| **all** | | **{tried}** | **{right}** | **{tried - right}** |", ""]
    lines += ["The last output of each part:", ""]
    lines += [
        f"- {part.replace('_', ' ')}: {told['output']}, {told['date']}, commit {told['commit']}"
        for part, told in sorted(parts.items())
    ]
    notes = {
        f"{name}": row["notes"]
        for told in parts.values()
        for name, row in told["tests"].items()
        if len(row["notes"]) > 1
    }
    for name, all_notes in notes.items():
        lines += [
            "",
            f"{name.capitalize()}:",
            "",
            *(f"- {key}: {note}" for key, note in all_notes.items()),
        ]
    left = [one for row in every for one in row["left"]]
    lines += ["", "What is left:", "", *(f"- {_short(one)}" for one in left)]
    return "\n".join([*lines, *([] if left else ["- nothing that these found"]), ""])


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    line = re.sub(r"/\S*/pytest-of-\w+/\S*?(?=/|\s|$)", "…", line)
    return f"`{line[:150]} … {line[-150:]}`" if len(line) > 300 else f"`{line}`"
