"""The shape of a stage: what it makes, when, and who reads it."""

from __future__ import annotations

from pathlib import Path

from moe_lab.compute import Compute
from moe_lab.stages.context import Context
from moe_lab.stages.run import Run
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact, Store


def doubled(context: Context, number: int) -> Artifact:
    """A result of its own kind: a file with a number."""

    def make(folder: Path) -> None:
        (folder / "number").write_text(str(2 * number))

    return context.store.get("doubled", {"number": number}, make)


def read(run: Run, name: str, result: Artifact) -> None:
    run.report[f"number/{name}"] = int((result.folder / "number").read_text())


def test_results_are_made_once_and_read_in_every_run(tmp_path: Path) -> None:
    asked = {"first": 2, "second": 3, "again": 2}
    stage = Stage(lambda run: asked, doubled, read)
    context = Context(Store(tmp_path / "store"), Compute("cpu"))
    run = Run({}, None, context, tmp_path, {"status": "running"}, {})
    stage.run(run)
    told = {key: value for key, value in run.report.items() if key.startswith(("num", "cached"))}
    assert told == {
        "cached/first": False, "number/first": 4, "cached/second": False, "number/second": 6,
        "cached/again": True, "number/again": 4,
    }  # fmt: skip
    assert run.results.keys() == asked.keys()
    assert len(list((tmp_path / "store" / "doubled").glob("*/number"))) == 2


def test_nothing_is_made_where_nothing_was_asked(tmp_path: Path) -> None:
    run = Run({}, None, Context(Store(tmp_path / "store"), Compute("cpu")), tmp_path, {}, {})
    Stage(lambda run: {}, doubled, read).run(run)
    assert run.report == {} and run.results == {} and not (tmp_path / "store").exists()
