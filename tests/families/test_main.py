"""The command: what it refuses, its exit code, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from moe_lab.families import all_types
from moe_lab.families.__main__ import main
from moe_lab.families.all_types import Row
from moe_lab.families.checks import CHECKS
from moe_lab.families.outcome import Outcome
from moe_lab.families.table import TABLE_MARKS


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What every check of every type comes to."""
    told = {"of": "yes"}

    def check_types(names: Sequence[str], processes: int) -> Iterator[Row]:
        for name in names:
            outcome = Outcome(told["of"], "why")  # type: ignore[arg-type]
            yield Row(name, "AutoModelForCausalLM", dict.fromkeys(CHECKS, outcome))

    monkeypatch.setattr(all_types, "check_types", check_types)
    return told


@pytest.mark.parametrize(
    ("of", "code"), [("yes", 0), ("refused", 0), ("not built", 0), ("fault", 1), ("silent", 1)]
)
def test_the_exit_code(state: dict[str, str], of: str, code: int) -> None:
    state["of"] = of
    assert main(["mixtral"]) == code


def test_an_unknown_type_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixtrall"]) == 2
    assert "there is mixtral" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [["mixtral", "--write", "page.md"], ["--processes", "0"], ["--processes", "two"]]
)
def test_options_that_do_not_go_together(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2


def test_what_is_written(state: dict[str, str], tmp_path: Path) -> None:
    page, outcomes = tmp_path / "page.md", tmp_path / "outcomes.json"
    page.write_text(f"{TABLE_MARKS[0]}\n{TABLE_MARKS[1]}\n")
    assert main(["--write", str(page), "--json", str(outcomes)]) == 0
    rows = [Row.from_json(values) for values in json.loads(outcomes.read_text())]
    assert len(rows) >= 80 and f"| {rows[0].name} | yes |" in page.read_text()
