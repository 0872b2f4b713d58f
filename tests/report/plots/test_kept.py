"""Pictures that are kept: the same bytes as drawn, and drawn again wherever anything changed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictured_runs import PLANS, save_curve, save_report, save_usage

from moe_lab.report.frame import read_reports
from moe_lab.report.plots import kept, run, style, sweep
from moe_lab.report.plots.kept import run_pictures, sweep_pictures
from moe_lab.report.plots.run import draw_run
from moe_lab.report.plots.sweep import draw_sweep
from moe_lab.report.report import read_report

Drawn = Callable[..., dict[str, bytes]]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The pictures of a run's folder, and in `drawn.times` how often any were drawn.

    What is drawn is what they would show, in words.
    """

    def counted(folder: Path, told: Any, home: Path) -> list[Path]:
        take.times += 1
        for name in ("kept.pdf", "scores.png"):
            (home / name).write_text(
                f"{told} {[file.read_text() for file in run.shown_files(folder)]}"
            )
        return [home / "scores.png"]

    counted.__module__ = run.__name__  # whose code the pictures depend on
    monkeypatch.setattr(run, "draw_run_into", counted)

    def take(folder: Path) -> dict[str, bytes]:
        pngs = run_pictures(folder, read_report(folder), tmp_path / "store")
        assert [file.suffix for file in pngs] == [".png"] * len(pngs)
        return {file.name: file.read_bytes() for file in (folder / "plots").iterdir()}

    take.times = 0
    return take


def _run(folder: Path, **told: Any) -> Path:
    save_report(folder, metric="reap", **told)
    (folder / "plan.json").write_text(PLANS["prune"][0].to_text())
    return folder


def test_they_are_drawn_once(drawn: Any, tmp_path: Path) -> None:
    one, other = _run(tmp_path / "a", run_id="1"), _run(tmp_path / "b", run_id="2")
    told = {"seconds/total": 3.0, "sweep": "another"}
    assert drawn(one) == drawn(one) == drawn(_run(other, **told)) and drawn.times == 1


def test_they_are_those_that_are_drawn(tmp_path: Path) -> None:
    for name in "ab":
        _run(tmp_path / name)
    names = {file.name for file in draw_run(tmp_path / "a")}
    for _ in range(2):
        pngs = run_pictures(tmp_path / "b", read_report(tmp_path / "b"), tmp_path / "store")
        assert {file.name for file in pngs} == names
        one, other = (
            {file.name: file.read_bytes() for file in (tmp_path / name / "plots").iterdir()}
            for name in "ab"
        )
        assert one == other and len(one) == 2 * len(names)


def test_whatever_they_show_or_are_drawn_with_has_them_drawn_again(
    drawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _run(tmp_path / "a")
    seen = [drawn(folder)]
    save_report(folder, metric="ean")
    seen.append(drawn(folder))
    save_usage(folder, {0: 4, 1: 4})
    seen.append(drawn(folder))
    save_curve(folder, ("lm",))
    seen.append(drawn(folder))
    (folder / "plan.json").write_text(PLANS["merge"][0].to_text())
    seen.append(drawn(folder))
    assert drawn.times == len(seen) and all(a != b for a, b in itertools.pairwise(seen))
    for name, changed in {
        "version": lambda name: "another",
        "code_version": lambda code: "another",
        "_settings": lambda: ["figure.dpi: 10"],
    }.items():
        monkeypatch.setattr(kept, name, changed)
        drawn(folder)
    assert drawn.times == len(seen) + 3


def test_what_is_missing_or_damaged_is_there_again(drawn: Any, tmp_path: Path) -> None:
    folder = _run(tmp_path / "a")
    whole = drawn(folder)
    (folder / "plots" / "scores.png").unlink()
    (folder / "plots" / "kept.pdf").write_bytes(b"torn")
    assert drawn(folder) == whole and drawn.times == 1


def test_a_user_s_settings_of_matplotlib_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MATPLOTLIBRC", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not list(kept._settings())
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "matplotlibrc").write_text("font.size: 20")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "mine"))
    (tmp_path / "mine").write_text("font.size: 30")
    assert list(kept._settings()) == ["font.size: 30", "font.size: 20"]


def test_pictures_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same results in another folder the same, undrawn; of other results others."""
    figures: list[str] = []
    panels = style.panels
    monkeypatch.setattr(style, "panels", lambda *a, **k: figures.append("one") or panels(*a, **k))

    def made(name: str, quality: float = 0.5) -> dict[str, bytes]:
        folder = tmp_path / name
        for number, ratio in enumerate((0.25, 0.5)):
            values = {"compressed/eval/average": quality - ratio / 4, "dense/eval/average": 0.9}
            costs = {"compressed/parameter_ratio": 1 - ratio, "dense/parameter_ratio": 1.0}
            places = {"sweep": name, "job": f"ratio={ratio}", "seconds/total": len(name) * 1.0}
            save_report(folder / str(number), ratio=ratio, **values, **costs, **places)
        sweep_pictures(folder, read_reports(folder), tmp_path / "store")
        return {file.name: file.read_bytes() for file in (folder / "plots").iterdir()}

    first = made("one")
    assert len(first) >= 4 and (number := len(figures))
    assert made("another") == first and len(figures) == number
    assert made("third", 0.7).keys() == first.keys() and len(figures) == 2 * number
    fresh = draw_sweep(tmp_path / "one", read_reports(tmp_path / "one"))
    assert {file.name for file in fresh} <= first.keys()
    assert all(file.read_bytes() == first[file.name] for file in fresh)
    frame = read_reports(tmp_path / "one")
    keys = set(sweep.shown_jobs(frame))
    assert not {"sweep", "seconds/total"} & keys and "ratio" in keys
