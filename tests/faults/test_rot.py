"""Whatever befalls a file in the store, no run takes it for what it was, and none breaks off."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import damages
import fault_jobs
import pytest
from fault_jobs import DONE, Fault
from fault_subjects import Subject, Subjects
from fuzzed import Tally

from moe_lab.finetune.training import STATE
from moe_lab.models.write_journal import JOURNAL
from moe_lab.store import damage_of

NOT_RESULTS = (".lock",)
CARD = "README.md"  # written beside a checkpoint by each run that uses it


def kinds(store: Path) -> dict[str, list[Path]]:
    """The files in a store by their kind: where they lie, without keys and numbers."""
    found: dict[str, list[Path]] = {}
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.suffix not in NOT_RESULTS and path.name != CARD:
            stage, _, *inner = path.relative_to(store).parts
            name = re.sub(r"\d+", "#", "/".join(inner))
            name = re.sub(r"\w+(?=\.(png|pdf|csv)$)", "*", name)  # of one writer
            found.setdefault(f"{stage}/{name}", []).append(path)
    return found


def _removed(path: Path, others: list[Path]) -> None:
    path.unlink()


def _replaced(path: Path, others: list[Path]) -> None:
    """By another file of its kind, or of its stage's, where it has none, of the same name's end."""
    other = next((one for one in others if one.read_bytes() != path.read_bytes()), None)
    path.write_bytes(other.read_bytes() if other else b"{}")


def _by(change: Callable[[bytes, int], bytes], where: int) -> Callable[[Path, list[Path]], None]:
    return lambda path, others: path.write_bytes(change(path.read_bytes(), where))  # type: ignore[func-returns-value]


DAMAGES: dict[str, Callable[[Path, list[Path]], None]] = {
    "truncated": _by(damages.truncated, 10**9 + 7),
    "a bit flipped": _by(damages.flipped, 10**9 + 7),
    "emptied": _by(damages.emptied, 0),
    "removed": _removed,
    "replaced": _replaced,
}


def judged(subject: Subject, home: Path, path: Path, before: bytes) -> str:
    """What is wrong of a run on a damaged store; empty where all is as promised.

    It ends well with the same figures and the file as it was, or refuses in a line.
    """
    job = fault_jobs.run(home, subject.overrides())
    if not fault_jobs.no_traceback(job):
        return f"a traceback: {job.text()[-1500:]}"
    if job.process.exitcode == 2:
        error = str(subject.reports(home)[0].get("error"))
        return "" if error.strip() and len(error) < 1500 else f"refused with {error!r}"
    if wrong := subject.wrong(job):
        return "; ".join(wrong)
    if (
        (path.is_file() and path.name == DONE)
        or path.suffix in (".pdf", ".png")
        or "measure" in str(path)
    ):
        return ""  # they hold times
    if path.is_file() and path.read_bytes() == before:
        return ""
    # No stage of this run asked for it, as for a search whose plan is there: without its record it
    # is not finished, and else --verify finds it.
    result = next((folder for folder in path.parents if (folder / DONE).is_file()), None)
    if result is None or damage_of(result, quick=False):
        return ""
    return "the damage stayed, and nothing would tell"


def rot(subject: Subject, start: Path, kind: str, damage: str, home: Path) -> str:
    """Damage the last file of a kind in a copy of a store, run again, and judge that."""
    shutil.copytree(start, home)
    every = kinds(home / "store")
    path = every[kind][-1]
    others = [*every[kind], *(one for name in every for one in every[name] if _alike(one, path))]
    before = path.read_bytes()
    DAMAGES[damage](path, others)
    wrong = judged(subject, home, path, before)
    shutil.rmtree(home)
    return f"{kind} {damage}: {wrong}" if wrong else ""


def _alike(one: Path, other: Path) -> bool:
    return one.suffix == other.suffix and one != other


def every_kind(starts: dict[str, tuple[Subject, Path]]) -> Iterator[tuple[Subject, Path, str]]:
    """Each kind of file that the stores have, once: with a subject and the folder that has it."""
    seen: set[str] = set()
    for subject, home in starts.values():
        for kind in kinds(home / "store"):
            if kind not in seen:
                seen.add(kind)
                yield subject, home, kind


def test_some_files_rot(subjects: Subjects, tmp_path: Path, tally: Tally) -> None:
    subject = subjects["small"]
    for kind, damage in (
        ("profile/layer_#.safetensors", "a bit flipped"),
        ("plan/plan.json", "truncated"),
        ("compress/checkpoint/model.safetensors", "removed"),
    ):
        wrong = rot(subject, subject.home, kind, damage, tmp_path / "copy")
        tally.judge(not wrong, wrong)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_file_rots(
    damage: str, subjects: Subjects, tmp_path: Path, tally: Tally
) -> None:
    """The kinds are those that stores have, so that a new one is among them."""
    whole = ("recovered", "condensed", "quantized")
    starts = {name: (subjects[name], subjects[name].home) for name in whole}
    cases = list(every_kind(starts))
    assert len(cases) > 30
    for subject, home, kind in cases:
        wrong = rot(subject, home, kind, damage, tmp_path / "copy")
        tally.judge(not wrong, wrong)
    tally.check()


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_killed_runs_leave_rots(
    damage: str, subjects: Subjects, tmp_path: Path, tally: Tally
) -> None:
    """Files of results that are not finished: a killed fine-tuning's state, and the like."""
    for name, fault in (
        ("recovered", Fault(STATE, kill="after")),
        ("condensed", Fault(STATE, kill="after")),
        ("quantized", Fault(JOURNAL, number=4, kill="after")),
    ):
        subject, home = subjects[name], tmp_path / name
        if name == "quantized":  # all before that is there
            shutil.copytree(subject.home, home)
            shutil.rmtree(home / "store" / "quantize")
        killed = fault_jobs.run(home, subject.overrides(), fault)
        assert killed.killed
        unfinished = {path.parent for path in home.glob("store/*/*.lock")}
        assert unfinished
        for kind, (*_, path) in kinds(home / "store").items():
            folder = home / "store" / path.relative_to(home / "store").parts[0]
            if any((one / DONE).is_file() for one in path.parents if one.parent == folder):
                continue
            before = path.read_bytes()
            copy = tmp_path / "copy"
            shutil.copytree(home, copy)
            inner = copy / path.relative_to(home)
            DAMAGES[damage](inner, [one for one in kinds(copy / "store")[kind] if one != inner])
            job = fault_jobs.run(copy, subject.overrides())
            wrong = subject.wrong(job) + subject.other_files(copy / "store")
            tally.judge(not wrong, f"{kind} {damage}: {wrong}")
            shutil.rmtree(copy)
            assert before
    tally.check()
