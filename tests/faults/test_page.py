"""docs/faults.md has the figures of its data, and keeps those of parts that were not run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fault_page import END, START, Recorded, tables
from running import ROOT

PAGE = ROOT / "docs" / "faults.md"


def phase(name: str, when: str, failed: bool = False, tally: Any = None) -> Any:
    properties = [("faults", tally)] if tally else []
    return SimpleNamespace(
        nodeid=f"tests/faults/{name}", when=when, failed=failed, passed=not failed, skipped=False,
        duration=1.0, user_properties=properties,
    )  # fmt: skip


def test_the_page_has_the_figures_of_its_data() -> None:
    text = PAGE.read_text(encoding="utf-8")
    data = PAGE.with_suffix(".json")
    if data.is_file():
        known = json.loads(data.read_text(encoding="utf-8"))
        assert text.partition(START)[2].partition(END)[0].lstrip("\n") == tables(known)


def test_figures_are_counted_and_parts_kept(tmp_path: Path) -> None:
    page = tmp_path / "faults.md"
    page.write_text(f"before\n{START}\n{END}\nafter\n")
    tally = {"tried": 3, "right": 2, "left": ["one | went wrong"], "notes": {"killed": "2"}}
    first, second = Recorded(), Recorded()
    for test in ("test_kills.py::test_kills[a]", "test_kills.py::test_kills[b]"):
        first.add(phase(test, "call", failed=True))
        first.add(phase(test, "teardown", tally=tally))
    first.write(page, "0" * 40 + "+dirty")
    second.add(phase("test_wrong.py::test_one[a]", "call"))
    second.add(phase("test_wrong.py::test_one[a]", "teardown"))
    second.write(page, "1" * 40)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| kills | kills (killed: 4) | 6 | 4 | 2 |" in text
    assert "| wrong | one | 1 | 1 | 0 |" in text
    assert "| **all** | | **7** | **5** | **2** |" in text
    assert "- kills: 0 passed, 2 failed" in text and "commit 000000000000+dirty" in text
    assert text.count("- `one \\| went wrong`") == 2
