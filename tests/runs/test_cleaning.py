"""What the store holds, what of it is used, and what cleaning removes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from made_up_runs import Command, Stored, result, start, tell, write_sweep
from running import ROOT

from moe_lab import store as our_store
from moe_lab.locks import held
from moe_lab.runs import cleaning, listing
from moe_lab.runs.status import find_jobs
from moe_lab.store import Store


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_store_by_kind(stored: Stored, command: Command) -> None:
    held = cleaning.contents(stored.store.root)
    found = cleaning.by_kind(held, find_jobs(stored.runs))
    assert list(found) == [
        "profile", "search", "plan", "compress", "teacher", "finetune", "evaluate",
    ]  # fmt: skip
    for kind, one in found.items():
        files = [path for path in (stored.store.root / kind).glob("*/**/*") if path.is_file()]
        assert one["bytes"] == sum(path.stat().st_size for path in files)
        counts = one["results"], one["used"], one["unfinished"]
        two = kind in ("profile", "search", "compress")
        assert counts == (1 + two, 1, int(kind == "evaluate"))
    _, text, _ = command(stored.runs)
    assert re.search(r"^compress +2 +1 +0 +\d\.\d kB", text, re.MULTILINE)
    assert re.search(r"^--clean unused would free \d\.\d kB: 4 results", text, re.MULTILINE)


def test_the_store_is_found_where_it_was_made(
    stored: Stored, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert cleaning.stores(find_jobs(stored.runs)) == [stored.store.root]
    for file in stored.runs.glob("*/.hydra/hydra.yaml"):
        file.unlink()
    assert cleaning.stores(find_jobs(stored.runs)) == []
    write_sweep(stored.runs, [[], []], cwd=str(place))
    assert cleaning.stores(find_jobs(stored.runs)) == [stored.store.root]


def test_a_profile_of_routers_is_known_by_the_key_of_all_statistics(stored: Stored) -> None:
    identity = {"kind": "profile", "code": "c0dec0dec0de", "model": "777777777777"}
    routers = result(stored.store, "profile", model="777777777777", statistics="routers")
    whole = result(Store(stored.runs.parent / "other"), "profile", model="777777777777")
    assert whole.key == our_store.key_of(identity) != routers.key
    tell(stored.runs / "1", "ok", whole)  # as stages/profile.py names it
    assert routers.folder in _used(stored)


def test_results_made_within_stages(stored: Stored) -> None:
    similar = {"model": "777777777777", "data": None}
    inner = result(stored.store, "similarity", **similar)
    record = json.loads((inner.folder / "artifact.json").read_text())
    other = result(stored.store, "similarity", model="888888888888")
    assert not {inner.folder, other.folder} & _used(stored)
    outer = result(stored.store, "diagnose", similarity=record["identity"])
    tell(stored.runs / "1", "ok", outer)
    assert inner.folder in _used(stored)  # by the identity within the other's
    tell(stored.runs / "1", "killed", stored.compress, fingerprint__model="888888888888")
    assert other.folder in _used(stored)  # what a killed diagnosis of that model left


def test_a_model_from_the_store_is_used(stored: Stored, place: Path) -> None:
    folder = f"outputs/store/compress/{stored.old_compress.key}/checkpoint"
    start(stored.runs / "2", [], place, path=folder)
    tell(stored.runs / "2", "failed")
    assert stored.old_compress.folder in _used(stored)


def _used(stored: Stored) -> set[Path]:
    return cleaning.used(cleaning.contents(stored.store.root).results, find_jobs(stored.runs))


def test_a_dry_run_removes_nothing(stored: Stored, place: Path, command: Command) -> None:
    before = content(place)
    code, text, complaints = command(stored.runs, "--clean")
    assert (code, complaints) == (0, "")
    assert content(place) == before
    assert text.startswith("would remove 4 results of the 11 in")
    listed = set(re.findall(r"^  (\w+/[0-9a-f]{12}) ", text, re.MULTILINE))
    half = {f"evaluate/{stored.half.name}"}
    assert listed == half | stored.name(stored.old_profile, stored.old_search, stored.old_compress)
    assert "runs outside this folder may share the store" in text
    assert f"python -m moe_lab.runs {stored.runs} --clean unused --yes" in text


@pytest.mark.parametrize("what", cleaning.CHOICES)
def test_yes_removes_what_was_listed(stored: Stored, command: Command, what: str) -> None:
    before, sizes = stored.done(), content(stored.store.root)
    [listed] = json.loads(command(stored.runs, "--clean", what, "--json")[1])
    code, text, _ = command(stored.runs, "--clean", what, "--yes")
    gone = {one["result"] for one in listed["results"]}
    assert gone - {f"evaluate/{stored.half.name}"} == stored.name(*{
        "unused": [stored.old_profile, stored.old_search, stored.old_compress],
        "checkpoints": [stored.compress, stored.finetune],
        "search": [stored.search],
    }[what])  # fmt: skip
    assert code == 0
    assert before - stored.done() == gone & before
    left = content(stored.store.root)
    assert left == {name: text for name, text in sizes.items() if name[:-5] not in gone
                    and "/".join(name.split("/")[:2]) not in gone}  # fmt: skip
    freed = listing.size(sum(one["bytes"] for one in listed["results"]))
    assert f"removed {listing.many(len(gone), 'result')}: {freed} freed" in text
    assert command(stored.runs, "--clean", what)[1].startswith("would remove 0 results")


def test_removed_weights_are_made_again(stored: Stored, command: Command) -> None:
    identity = {"kind": "compress", "code": "c0dec0dec0de", "plan": stored.plan.key}
    assert stored.store.find("compress", identity).folder == stored.compress.folder
    text = command(stored.runs, "--clean", "checkpoints", "--yes")[1]
    assert "1 of these is fine-tuned weights: 0.0 s of training" in text
    assert stored.store.find("compress", identity) is None
    again = result(stored.store, "compress", size=5000, plan=stored.plan.key)
    assert (again.key, again.cached) == (stored.compress.key, False)


def test_orphaned_locks_go_too(stored: Stored, command: Command) -> None:
    orphan = stored.store.root / "plan" / "aaaaaaaaaaaa.lock"
    orphan.touch()
    command(stored.runs, "--clean", "--yes")
    assert not orphan.exists()


def test_what_is_running_stops_cleaning(stored: Stored, command: Command) -> None:
    before = content(stored.store.root)
    tell(stored.runs / "1", "running", stored.compress)
    with FileLock(stored.runs / "1" / "job.lock"):
        for what in cleaning.CHOICES:
            code, text, complaints = command(stored.runs, "--clean", what, "--yes")
            assert (code, text) == (2, "")
            assert f"{stored.runs}: 1; clean the store when nothing runs" in complaints
        assert "--clean checkpoints: not now: still running" in command(stored.runs)[1]
    assert content(stored.store.root) == before


def test_a_job_elsewhere_stops_cleaning(stored: Stored, command: Command) -> None:
    done, lock = stored.done(), stored.half.with_suffix(".lock")
    with FileLock(lock):
        code, _, complaints = command(stored.runs, "--clean", "checkpoints", "--yes")
    assert (code, stored.done()) == (2, done)
    assert f"{lock} is held: a job outside this folder" in complaints


def test_jobs_that_do_not_say_what_they_use_stop_cleaning(
    stored: Stored, place: Path, command: Command
) -> None:
    done = stored.done()
    start(stored.runs / "2", [], place)  # killed before reports were written at the start
    tell(stored.runs / "1", "ok", seconds__profile=1.0)
    code, _, complaints = command(stored.runs, "--clean", "--yes")
    assert (code, stored.done()) == (2, done)
    assert "do not say which results they use (artifact/<stage> in their reports): " in complaints
    assert f"{stored.runs}: 1, 2;" in complaints
    assert command(stored.runs, "--clean", "checkpoints")[0] == 0


def test_another_store_than_theirs_is_not_cleaned(
    stored: Stored, place: Path, command: Command
) -> None:
    other = result(Store(place / "other"), "profile")
    code, _, complaints = command(stored.runs, "--clean", "--yes", "--store", place / "other")
    assert (code, other.folder.exists()) == (2, True)
    assert "these runs name none of the results in" in complaints
    code, _, complaints = command(stored.runs, "--clean", "--store", place / "gone")
    assert (code, "there is no store at" in complaints) == (2, True)


def test_what_was_just_made_is_not_called_unused(stored: Stored, command: Command) -> None:
    young = result(stored.store, "profile", model="young", recent=True)
    text = command(stored.runs, "--clean", "--yes")[1]
    assert young.folder.is_dir()
    assert "1 unused result of the last 10 minutes left out" in text


def test_unfinished_jobs_are_told_of(stored: Stored, place: Path, command: Command) -> None:
    start(stored.runs / "2", [], place)
    tell(stored.runs / "2", "failed", stored.plan)
    for what in cleaning.CHOICES:
        assert "1 job here did not finish" in command(stored.runs, "--clean", what)[1]


def test_links_and_strangers_are_left_alone(stored: Stored, place: Path, command: Command) -> None:
    root, precious = stored.store.root, place / "precious"
    (precious / "0123456789ab").mkdir(parents=True)
    (precious / "0123456789ab" / "file").write_text("precious")
    (root / "measure").symlink_to(precious)
    (root / "plan" / "ffffffffffff").symlink_to(precious)
    (stored.old_compress.folder / "checkpoint" / "link").symlink_to(precious)
    for name in ("activations_x/0123456789ab", "plan/notes", "mine/0123456789ab"):
        (root / name).mkdir(parents=True)
        (root / name / "file").write_text("mine")
    text = command(stored.runs)[1]
    assert "activations_x (4 B), " in text
    command(stored.runs, "--clean", "--yes")
    assert not stored.old_compress.folder.exists()
    assert (precious / "0123456789ab" / "file").read_text() == "precious"
    assert (root / "measure").is_symlink() and (root / "plan" / "ffffffffffff").is_symlink()
    for name in ("activations_x/0123456789ab", "plan/notes", "mine/0123456789ab"):
        assert (root / name / "file").read_text() == "mine"


def test_an_interrupted_removal_is_not_done(
    stored: Stored, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", stopped)
        command(stored.runs, "--clean", "search", "--yes")
    assert stored.search.folder.is_dir()
    assert not stored.name(stored.search) & stored.done()
    assert not held(stored.search.folder.with_suffix(".lock"))
    command(stored.runs, "--clean", "--yes")  # it is unfinished now
    assert not stored.search.folder.exists()


def test_a_result_that_changed_meanwhile_stays(stored: Stored) -> None:
    looked_at = {one.key: one for one in cleaning.contents(stored.store.root).results}
    half, old = looked_at[stored.half.name], looked_at[stored.old_compress.key]
    (stored.half / "artifact.json").write_text("{}")  # another job finished it
    assert not cleaning.remove(half)
    with FileLock(old.lock):
        assert not cleaning.remove(old)
    assert stored.half.is_dir() and old.folder.is_dir()
    assert cleaning.remove(old)
    assert not cleaning.remove(old)


def test_every_kind_of_result_is_known() -> None:
    """A kind that cleaning does not know is never touched, and so would never be freed."""
    source = "\n".join(path.read_text() for path in (ROOT / "moe_lab").rglob("*.py"))
    assert set(re.findall(r'store\.get\(\s*"(\w+)"', source)) == set(cleaning.KINDS)
