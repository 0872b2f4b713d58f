"""Runs made again from their own record, and compared: `python -m moe_lab.runs FOLDER --reproduce`.

Each runs anew in a store of its own, so that nothing of what it made before is used. Compared are
its settings and figures, all but what a clock says, and the files of its results byte for byte,
where their store still has them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from moe_lab.files import HYDRA, PLAN, REPORT, REPRODUCED
from moe_lab.report.figures import is_timed
from moe_lab.report.report import OK, Report, read_report
from moe_lab.report.run_files import read_text, words_of
from moe_lab.runs.quoting import override
from moe_lab.runs.rerun import SCRIPT, Command, check_recorded, without, working_folder
from moe_lab.runs.status import Job
from moe_lab.store import FILES, read_record
from moe_lab.types import UserError

# Of a run's place and time, not of its result.
NOT_COMPARED = ("run_id", "url", "sweep", "job", "status", "error", "checkpoint")
FRESH_STORE = "store"  # of a run made again, beside its report
# What a result was made by; the store's keys hold the code's version.
MADE_BY = re.compile(r"(commit|hardware)$|(versions|artifact)/")
# Kinds of results whose files hold no times.
EXACT = ("convert", "profile", "plan", "compress", "teacher", "finetune", "quantize")


@dataclass(frozen=True)
class Reproduction:
    """A run beside its record.

    error: why it did not end well, else None. equal: how many figures and settings are the same;
    differing: those that are not, as (key, then, now); elsewhere: what else is not the same: code,
    versions, machine. files: how many of its results' files are byte-equal; other_files: those that
    are not.
    """

    job: Job
    error: str | None
    equal: int = 0
    differing: tuple[tuple[str, Any, Any], ...] = ()
    elsewhere: tuple[tuple[str, Any, Any], ...] = ()
    files: int = 0
    other_files: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether the record holds."""
        return not (self.error or self.differing or self.other_files)

    def told(self, root: Path) -> Iterator[str]:
        """Its lines for people."""
        name = self.job.folder.relative_to(root.resolve()).as_posix()
        if self.error:
            yield f"{name}: could not be made again: {self.error}"
            return
        verdict = "reproduced" if self.same else "NOT reproduced"
        total = self.equal + len(self.differing)
        every_file = self.files + len(self.other_files)
        yield (
            f"{name}: {verdict}: {self.equal} of {total} figures and settings equal, "
            f"{self.files} of {every_file} files byte-equal"
        )
        for key, then, now in self.elsewhere:
            yield f"  made with another {key}: {then} then, {now} now"
        for key, then, now in self.differing:
            yield f"  {key}: {then} then, {now} now"
        for file in self.other_files:
            yield f"  {file}: other bytes"


def reproduce(jobs: list[Job], stores: list[Path]) -> Iterator[Reproduction]:
    """Make each finished job again, one after the other, and compare.

    stores: where results of theirs may lie. What was made lies in the job's folder, reproduced/;
    where all is the same its store, a second copy, is removed. UserError where no job ended well.
    """
    done = [job for job in jobs if job.status == OK]
    if not done:
        raise UserError("no job here ended well, so there is nothing to make again")
    for job in done:
        yield _again(job, stores)


def compared(before: Report, now: Report) -> tuple[int, list[tuple[str, Any, Any]]]:
    """How many keys of two reports are equal, and those that are not, with both values."""
    keys = dict.fromkeys([*before, *now])
    pairs = [(key, before.get(key), now.get(key)) for key in keys if not _of_the_moment(key)]
    differing = [(key, one, other) for key, one, other in pairs if one != other]
    return len(pairs) - len(differing), differing


def _again(job: Job, stores: list[Path]) -> Reproduction:
    folder = job.folder / REPRODUCED
    rmtree(folder, ignore_errors=True)
    hydra = job.folder / HYDRA
    own = without(job.overrides or (), "run_dir", "store", "track", "track.mode")
    words = words_of(own, read_text(hydra / "hydra.yaml"))
    cwd = working_folder(job)
    check_recorded(words, hydra, cwd)
    words += [override("run_dir", str(folder)), override("store", str(folder / FRESH_STORE))]
    command = (sys.executable, str(SCRIPT), *words, "track=off")
    code = Command(folder, (job,), command, cwd).run()
    if not (folder / REPORT).is_file():
        return Reproduction(job, f"{SCRIPT.name} ended with {code} and left no report")
    before, now = read_report(job.folder), read_report(folder)
    if now["status"] != OK:
        return Reproduction(job, str(now["error"]))
    equal, differing = compared(before, now)
    origin = [one for one in differing if MADE_BY.match(one[0])]
    files, others = _compared_files(before, now, stores, folder / FRESH_STORE)
    if read_text(job.folder / PLAN) != read_text(folder / PLAN):
        others.append(PLAN)
    made = Reproduction(
        job, None, equal, tuple(one for one in differing if one not in origin), tuple(origin),
        files, tuple(others),
    )  # fmt: skip
    if made.same:
        rmtree(folder / FRESH_STORE)
    return made


def _compared_files(
    before: Mapping[str, Any], now: Mapping[str, Any], stores: list[Path], fresh: Path
) -> tuple[int, list[str]]:
    """Of the results that both made: how many files are byte-equal, and those that are not."""
    equal, others = 0, []
    for key in before:
        kind = str(before[key]).partition("/")[0]
        if not key.startswith("artifact/") or kind not in EXACT or key not in now:
            continue
        one = next(filter(None, (_seals(root / str(before[key])) for root in stores)), None)
        other = _seals(fresh / str(now[key]))
        if one is None or other is None:
            continue
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) == other.get(name):
                equal += 1
            else:
                others.append(f"{key.removeprefix('artifact/')}: {name}")
    return equal, others


def _seals(folder: Path) -> dict[str, Any] | None:
    try:
        return read_record(folder).get(FILES)
    except (OSError, ValueError):
        return None


def _of_the_moment(key: str) -> bool:
    """Whether a key is of when and where a run was, or of what a clock said."""
    return key.rpartition("/")[2] in NOT_COMPARED or is_timed(key) or key.startswith("cached/")
