"""Jobs as a list: on a terminal, narrower, as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from made_up_runs import Command, Stored, start, tell, write_sweep


def test_the_list(sweep: Path, command: Command) -> None:
    code, text, complaints = command(sweep.parent)
    assert (code, complaints) == (0, "")
    lines = text.splitlines()
    assert lines[0].split() == ["job", "status", "stage", "time", "cached", "settings"]
    assert [line.split()[0] for line in lines[1:12]] == [f"sweep/{number}" for number in range(11)]
    assert re.split(r"  +", lines[2]) == [
        "sweep/1", "failed", "plan", "7.0 s", "1 of 2", "ratio=1", "too many",
    ]  # fmt: skip
    assert re.split(r"  +", lines[4])[5:] == ["ratio=3", "10:01 evaluate: 1 of 2"]
    assert re.split(r"  +", lines[6]) == ["sweep/5", "missing", "–", "–", "–", "ratio=5"]
    assert re.split(r"  +", lines[11])[3] == "2 min 5 s"
    assert lines[13] == (
        "11 jobs: 2 ok, 1 failed, 2 killed, 1 running, 5 missing; 15.0 s computed, 8 min 20 s "
        "saved by the store (cached stages)"
    )
    assert "--rerun" not in text  # while one of them is running


def test_how_to_run_again(sweep: Path, command: Command) -> None:
    tell(sweep / "3", "failed")
    (sweep / "3" / "job.lock").unlink()
    line = f"to run 9 jobs again: python -m moe_lab.runs {sweep.parent} --rerun"
    assert line in command(sweep.parent)[1].splitlines()


def test_only_some_statuses(sweep: Path, command: Command) -> None:
    _, text, _ = command(sweep, "--status", "failed,missing")
    assert [line.split()[0] for line in text.splitlines()[1:7]] == ["1", "5", "6", "7", "8", "9"]
    assert "11 jobs: 2 ok" in text
    with pytest.raises(SystemExit):
        command(sweep, "--status", "broken")


@pytest.mark.parametrize("width", [80, 160])
def test_on_a_terminal_no_line_is_wider(
    sweep: Path, command: Command, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    tell(sweep / "1", "failed", error="long words " * 30)
    _, text, _ = command(sweep.parent)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    table = lines[: lines.index("")]
    assert max(map(len, table)) == width
    assert table[1] == "sweep"
    assert [line.split()[0] for line in table if line[0].isdigit()] == list(map(str, range(11)))
    assert next(line for line in table if "long words" in line).endswith("…")


def test_json(stored: Stored, command: Command) -> None:
    said = json.loads(command(stored.runs, "--json")[1])
    assert [one["job"] for one in said["jobs"]] == ["0", "1"]
    assert said["jobs"][0] | {"seconds": 0} == {
        "job": "0", "status": "ok", "stage": "evaluate", "seconds": 0, "cached": 0, "stages": 1,
        "settings": "", "note": "",
    }  # fmt: skip
    assert said["summary"]["jobs"] == 2
    assert said["summary"]["statuses"] == {"ok": 2}
    assert said["stores"][0]["kinds"]["compress"]["used"] == 1
    assert {one["what"]: one["results"] for one in said["stores"][0]["free"]} == {
        "unused": 4, "checkpoints": 2, "search": 1,
    }  # fmt: skip


def test_where_jobs_are_not_known(place: Path, command: Command) -> None:
    start(place / "old" / "0", [], place)
    tell(place / "old" / "0", "ok")
    (place / "old" / "multirun.yaml").touch()
    write_sweep(place / "other", None)
    start(place / "other" / "0", [], place)
    tell(place / "other" / "0", "ok")
    _, text, _ = command(place)
    for name in ("old", "other"):
        assert f"{name}: which of its jobs never started is not known" in text
