"""`--verify`: every byte of a store, and what is damaged set aside."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from made_up_runs import Command, result, start, tell

from moe_lab import integrity
from moe_lab.runs import cleaning, verifying
from moe_lab.store import Store


def a_run(place: Path) -> tuple[Store, list]:
    store = Store(place / "outputs" / "store")
    made = [result(store, kind) for kind in ("profile", "plan", "compress")]
    start(place / "runs" / "one", ["model=tiny"], place)
    tell(place / "runs" / "one", "ok", *made)
    return store, made


def test_undamaged_store_is_said_to_be(place: Path, command: Command) -> None:
    a_run(place)
    code, out, _ = command("runs", "--verify")
    assert code == 0 and "3 results" in out and "0 damaged" in out


def test_without_a_folder_it_is_that_of_run_py(place: Path, command: Command) -> None:
    a_run(place)
    (place / "runs").rename(place / "outputs" / "runs")
    code, out, _ = command("--verify")
    assert code == 0 and "3 results" in out


def test_large_files_are_looked_at_too_and_set_aside(
    place: Path, command: Command, monkeypatch
) -> None:
    store, (_, plan, compress) = a_run(place)
    monkeypatch.setattr(integrity, "QUICK_BYTES", 0)
    (compress.folder / "checkpoint" / "weights").write_bytes(b"y" * 100)
    (plan.folder / "artifact.json").write_text("{")
    code, out, _ = command("runs", "--verify")
    assert code == 1 and "3 results" in out and "2 damaged" in out
    assert f"compress/{compress.key}: checkpoint/weights has changed" in out
    assert f"plan/{plan.key}: artifact.json cannot be read" in out
    assert "--verify --yes" in out and compress.folder.is_dir()

    code, out, _ = command("runs", "--verify", "--yes")
    assert code == 1 and f"{compress.key}.damaged-1" in out and not compress.folder.exists()
    assert command("runs", "--verify")[:1] == (0,)
    # What was set aside is not used, and goes with the rest of that.
    chosen = cleaning.chosen_results(cleaning.contents(store.root), [], cleaning.UNUSED)
    assert {one.kind for one, why in chosen.items() if why == "damaged"} == {"plan", "compress"}
    assert all(cleaning.remove(one) for one, why in chosen.items() if why == "damaged")
    assert not list(store.root.glob("*/*damaged*"))


def test_what_a_job_holds_is_left_to_it(place: Path) -> None:
    store, (_, _, compress) = a_run(place)
    (compress.folder / "checkpoint" / "weights").write_bytes(b"y" * 100)
    found = verifying.damaged(cleaning.contents(store.root))
    with FileLock(compress.folder.with_suffix(".lock")):
        assert list(verifying.set_all_aside(found)) == []
    assert len(list(verifying.set_all_aside(found))) == 1
    assert list(verifying.set_all_aside(found)) == []


def test_without_a_store_it_is_asked_for(place: Path, command: Command) -> None:
    start(place / "runs" / "one", ["model=tiny"], place)
    code, _, complaint = command("runs", "--verify")
    assert code == 2 and "--store" in complaint


@pytest.mark.parametrize(
    "words", [["--verify", "--reproduce"], ["--verify", "--json"], ["--reproduce", "--yes"]]
)
def test_deeds_that_do_not_go_together(words: list[str], command: Command) -> None:
    with pytest.raises(SystemExit) as ended:
        command("runs", *words)
    assert ended.value.code == 2
