"""Jobs listed, run again and their store cleaned, on folders made up as runs leave them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from filelock import FileLock

from moe_lab import store as our_store
from moe_lab.report.report import write_report
from moe_lab.runs import cleaning, listing, rerun
from moe_lab.runs.__main__ import main
from moe_lab.runs.status import find_jobs, held, settings_apart
from moe_lab.store import Artifact, Store
from moe_lab.types import UserError

HOUR_AGO = -3600.0
REAP = "metric=reap,frequency"


def age(path: Path, seconds: float) -> None:
    """Shift a file's time."""
    time = path.stat().st_mtime + seconds
    os.utime(path, (time, time))


def start(folder: Path, overrides: list[str], cwd: Path, path: str = "shipped:tiny") -> None:
    """What Hydra leaves as a job starts; an hour ago."""
    hydra = folder / ".hydra"
    hydra.mkdir(parents=True)
    config = f"model:\n  path: {path}\nstore: outputs/store\nrun_dir: a/${{now:%Y}}\n"
    (hydra / "config.yaml").write_text(config)
    (hydra / "overrides.yaml").write_text("".join(f"- {one}\n" for one in overrides) or "[]\n")
    (hydra / "hydra.yaml").write_text(f"hydra:\n  runtime:\n    cwd: {cwd}\n")
    age(hydra / "config.yaml", HOUR_AGO)


def tell(folder: Path, status: str, *used: Artifact | tuple[str, Artifact], **more: Any) -> None:
    """A report of a job that used these results; a stage is named by its kind or as given."""
    said: dict[str, Any] = {"status": status, "error": None, "model": "tiny"}
    for one in used:
        stage, made = one if isinstance(one, tuple) else (one.kind, one)
        said |= {f"seconds/{stage}": made.seconds, f"cached/{stage}": made.cached,
                 f"artifact/{stage}": f"{made.kind}/{made.key}"}  # fmt: skip
    write_report(folder, said | {key.replace("__", "/"): value for key, value in more.items()})


def write_sweep(folder: Path, overrides: list[list[str]] | None, **more: Any) -> None:
    said = {"argv": ["-m", REAP], "cwd": str(folder.parent), "script": sys.executable,
            "python": sys.executable, "overrides": overrides, "started_at": "2026"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(said | more))


def result(store: Store, kind: str, size: int = 100, recent: bool = False, **identity: Any) -> Any:
    """A finished result of about that size, an hour old."""

    def make(folder: Path) -> None:
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "weights").write_bytes(b"x" * size)

    made = store.get(kind, {"kind": kind, "code": "c0dec0dec0de"} | identity, make)
    if not recent:
        age(made.folder / "artifact.json", HOUR_AGO)
    return made


def unfinished(store: Store, kind: str) -> Path:
    """What a killed job leaves of a result."""

    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get(kind, {"half": kind}, make)
    return next(path.parent for path in (store.root / kind).glob("*/half"))


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sweep(place: Path) -> Iterator[Path]:
    """Jobs 0 to 10: ok, failed, killed, running, killed before it reported, 5 to 9 missing, ok."""
    folder = place / "runs" / "sweep"
    overrides = [["model=tiny", f"ratio={number}"] for number in range(11)]
    write_sweep(folder, overrides)
    stages = {"seconds__profile": 100.0, "cached__profile": True, "seconds__plan": 3.0,
              "cached__plan": False}  # fmt: skip
    for number, status in enumerate(["ok", "failed", "running", "running"]):
        start(folder / str(number), overrides[number], place)
        tell(folder / str(number), status, **stages)
    start(folder / "4", overrides[4], place)
    start(folder / "10", overrides[10], place)
    tell(folder / "10", "ok", **stages, seconds__total=125.0)
    tell(folder / "1", "failed", **stages | {"error": "too\nmany", "seconds__total": 7.0})
    (folder / "3" / "run.log").write_text("10:00 profile\n10:01 evaluate:  1 of 2\n\n")
    (folder / "2" / "job.lock").touch()
    with FileLock(folder / "3" / "job.lock"):
        yield folder


class Stored:
    """A store and two jobs that use most of it; a third did not get far."""

    def __init__(self, place: Path) -> None:
        self.store = store = Store(place / "outputs" / "store")
        self.runs = place / "outputs" / "runs" / "a"
        self.profile = result(store, "profile", model="0123456789ab")
        self.plan = result(store, "plan", profile=self.profile.key)
        self.compress = result(store, "compress", size=5000, plan=self.plan.key)
        self.teacher = result(store, "teacher", model="0123456789ab")
        self.finetune = result(store, "finetune", size=7000, plan=self.plan.key,
                               checkpoint=self.compress.key, teacher=self.teacher.key)  # fmt: skip
        self.evaluate = result(store, "evaluate", checkpoint=self.finetune.key)
        self.search = result(store, "search", profile=self.profile.key, question="experts")
        self.old_profile = result(store, "profile", model="ba9876543210")
        self.old_search = result(store, "search", profile=self.old_profile.key)
        self.old_compress = result(store, "compress", size=3000, plan="aaaaaaaaaaaa")
        self.half = unfinished(store, "evaluate")
        for number, used in enumerate([(self.evaluate,), (self.compress,)]):
            start(self.runs / str(number), [], place)
            tell(self.runs / str(number), "ok", *used)

    def done(self) -> set[str]:
        """The finished results, as <kind>/<key>."""
        found = self.store.root.glob("*/*/artifact.json")
        return {path.parent.relative_to(self.store.root).as_posix() for path in found}

    def name(self, *made: Artifact) -> set[str]:
        return {f"{one.kind}/{one.key}" for one in made}


@pytest.fixture
def stored(place: Path) -> Stored:
    return Stored(place)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process: its code, what it printed, and its complaints."""

    def call(*words: Any) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return call


# Listing


def test_statuses_in_the_order_of_the_jobs(sweep: Path) -> None:
    found = find_jobs(sweep)
    assert [job.folder.name for job in found] == [str(number) for number in range(11)]
    states = ["ok", "failed", "killed", "running", "killed", *["missing"] * 5, "ok"]
    assert [job.status for job in found] == states
    assert {job.sweep.folder for job in found} == {sweep}


def test_a_job_of_another_process_is_running_until_it_is_killed(sweep: Path) -> None:
    code = "import sys, filelock as f; l = f.FileLock(sys.argv[1]); l.acquire(); print(); input()"
    command = [sys.executable, "-c", code, str(sweep / "2" / "job.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        assert find_jobs(sweep)[2].status == "running"
        process.kill()
    assert find_jobs(sweep)[2].status == "killed"


def test_a_job_that_is_being_run_again_is_running(sweep: Path) -> None:
    with FileLock(sweep / "1" / "job.lock"):
        assert find_jobs(sweep)[1].status == "running"
    assert find_jobs(sweep)[1].status == "failed"


def test_a_job_that_just_started_is_not_called_killed(sweep: Path) -> None:
    age(sweep / "4" / ".hydra" / "config.yaml", -HOUR_AGO)
    assert find_jobs(sweep)[4].status == "running"


def test_stages_and_times(sweep: Path) -> None:
    found = find_jobs(sweep)
    assert found[0].stages == ["profile", "plan"]
    assert (found[0].num_cached, found[0].seconds(True), found[0].seconds(False)) == (1, 100, 3)
    assert found[10].elapsed == 125.0
    assert found[3].elapsed == pytest.approx(3600, abs=60)  # until now
    age(sweep / "2" / "report.json", -600)
    assert find_jobs(sweep)[2].elapsed == pytest.approx(3000, abs=60)  # until its last report
    assert found[5].elapsed is None


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


def test_settings_are_what_differs(place: Path) -> None:
    start(place / "s" / "0", ["a=1", "b=1", "run_dir=x"], place)
    start(place / "s" / "1", ["a=1", "b=2", "run_dir=y"], place)
    start(place / "alone", ["a=1", "hydra.verbose=true", "+c=[1,2]"], place)
    found = settings_apart(find_jobs(place))
    assert [found[place / name] for name in ("s/0", "s/1", "alone")] == [
        "b=1",
        "b=2",
        "a=1 +c=[1,2]",
    ]


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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "gone is no folder"),
        ("empty", "empty has no runs: no report.json, .hydra or sweep.json"),
        ("broken", "report.json cannot be read"),
        ("half", "sweep.json cannot be read: KeyError('overrides')"),
    ],
)
def test_complaints(place: Path, command: Command, name: str, words: str) -> None:
    for made in ("empty", "broken", "half/0"):
        (place / made).mkdir(parents=True)
    (place / "broken" / "report.json").write_text("{")
    (place / "half" / "sweep.json").write_text('{"argv": []}')
    code, text, complaints = command(place / name)
    assert (code, text) == (2, "")
    assert words in complaints


def test_from_a_shell(sweep: Path) -> None:
    command = [sys.executable, "-m", "moe_lab.runs", str(sweep), "--status", "ok"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1].startswith("0    ok")


# What the store holds


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
    assert re.search(r"^compress +2 +1 +0 +8\.\d kB", text, re.MULTILINE)
    assert re.search(r"^--clean unused would free 4\.\d kB: 4 results", text, re.MULTILINE)


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


# Cleaning


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


# Running again


class Process:
    """In the place of subprocess.Popen: what was asked for, and a code for each."""

    asked: list[tuple[tuple[str, ...], Path]]
    codes: list[int]

    def __init__(self, words: tuple[str, ...], cwd: Path) -> None:
        self.asked.append((words, cwd))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        return self.codes.pop(0)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[Process]:
    Process.asked, Process.codes = [], []
    monkeypatch.setattr(subprocess, "Popen", Process)
    return Process


def fail(folder: Path, number: int, cwd: Path) -> None:
    start(folder / str(number), [f"a={number}"], cwd)
    tell(folder / str(number), "failed")


def test_a_sweep_runs_again(place: Path, command: Command, process: type[Process]) -> None:
    given = ["-m", REAP, "+hydra.sweep.dir=x", "resume=false", "hydra.sweep.dir.not=1"]
    write_sweep(place / "s", [["a=0"], ["a=1"], ["a=2"]], argv=given, cwd=str(place))
    fail(place / "s", 0, place)
    start(place / "s" / "1", ["a=1"], place)
    tell(place / "s" / "1", "ok")
    process.codes = [3]
    code, text, _ = command(place / "s", "--rerun")
    words = (sys.executable, sys.executable, "-m", REAP, "hydra.sweep.dir.not=1",
             f"hydra.sweep.dir={place / 's'}", "resume=true")  # fmt: skip
    assert process.asked == [(words, place)]
    assert code == 3
    assert text.startswith(f"{place / 's'}: running again 0 (failed), 2 (missing)\n")


def test_a_single_run_runs_again(place: Path, command: Command, process: type[Process]) -> None:
    start(place / "one", ["method=merge", "run_dir=old", "a='x y'"], place)
    tell(place / "one", "running")
    process.codes = [0]
    assert command("one", "--rerun")[0] == 0
    script = ROOT / "run.py"
    words = (sys.executable, str(script), "method=merge", "a='x y'", f"run_dir={place / 'one'}")
    assert process.asked == [(words, place)]
    assert script.is_file()


def test_several_run_one_after_another(
    place: Path, command: Command, process: type[Process]
) -> None:
    for name in ("a", "b", "c"):
        write_sweep(place / name, [["a=0"]])
    process.codes = [1, -15, 0]
    assert command(place, "--rerun")[0] == 143
    assert len(process.asked) == 3
    process.codes = [0, 130]
    assert command(place, "--rerun")[0] == 130
    assert len(process.asked) == 5  # not the third, after Ctrl-C


def test_ctrl_c_waits_for_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sweep(place / "s", [["a=0"]])
    answers: list[Any] = [KeyboardInterrupt(), 130]

    class Slow(Process):
        asked: list = []  # noqa: RUF012

        def wait(self) -> int:
            answer = answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

    monkeypatch.setattr(subprocess, "Popen", Slow)
    assert main([str(place / "s"), "--rerun"]) == 130
    assert not answers


def test_nothing_to_run_again(place: Path, command: Command, process: type[Process]) -> None:
    start(place / "one", [], place)
    tell(place / "one", "ok")
    code, text, _ = command(place, "--rerun")
    assert (code, process.asked) == (0, [])
    assert text.startswith("nothing to run again: 1 job: 1 ok")


def test_what_cannot_run_again(
    place: Path, sweep: Path, command: Command, process: type[Process]
) -> None:
    fail(place / "old", 0, place)
    (place / "old" / "multirun.yaml").touch()
    (place / "bare").mkdir()
    tell(place / "bare", "failed")
    write_sweep(place / "moved", [["a=0"]], script="/gone/run.py")
    fail(place / "away", 0, place / "gone")
    for folder, words in {
        sweep: f"{sweep} is still running (job 3)",
        sweep / "1": f"one job of a sweep, which only runs as a whole, its finished jobs left out: "
        f"python -m moe_lab.runs {sweep} --rerun",
        place / "old": f"hydra.sweep.dir={place / 'old'} resume=true",
        place / "bare": "has no .hydra/overrides.yaml",
        place / "moved": "where /gone/run.py existed",
        place / "away": f"was run from {place / 'gone'}, which is not there now",
    }.items():
        code, _, complaints = command(folder, "--rerun")
        assert (code, words in complaints) == (2, True), complaints
    assert command(place, "--rerun")[0] == 2
    assert process.asked == []


@pytest.mark.parametrize("name", ["2026-01-01_10-00-00", "a b, c=[1]", "it's", "50%+@x:y~z", "é"])
def test_folders_are_told_as_hydra_reads_them(place: Path, name: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (place / name).mkdir()
    word = rerun._override("run_dir", place / name)
    parsed = OverridesParser.create().parse_override(word)
    assert not parsed.is_sweep_override()
    assert str(parsed.value()) == str(place / name)


def test_a_real_process_runs_again(place: Path) -> None:
    script = place / "run.py"
    script.write_text("import os, sys; print(os.getcwd(), *sys.argv[1:]); sys.exit(2)")
    write_sweep(place / "s", [["a=0"]], script=str(script), cwd=str(place))
    command = [sys.executable, "-m", "moe_lab.runs", "s", "--rerun"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.splitlines()[-1] == (
        f"{place} -m {REAP} hydra.sweep.dir={place / 's'} resume=true"
    )


@pytest.mark.parametrize(
    "words",
    [["--yes"], ["--rerun", "--clean"], ["--rerun", "--json"], ["--clean", "--status", "ok"]],
)
def test_options_that_do_not_go_together(sweep: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(sweep), *words])
    assert stopped.value.code == 2


def test_a_result_is_no_job(stored: Stored) -> None:
    with pytest.raises(UserError, match="has no runs"):
        find_jobs(stored.store.root)


def test_every_kind_of_result_is_known() -> None:
    """A kind that cleaning does not know is never touched, and so would never be freed."""
    source = "\n".join(path.read_text() for path in (ROOT / "moe_lab").rglob("*.py"))
    assert set(re.findall(r'store\.get\(\s*"(\w+)"', source)) == set(cleaning.KINDS)
