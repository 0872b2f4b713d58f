"""The jobs below a folder and how far each came, from what they leave there.

A job is a folder with .hydra/ or report.json. It holds job.lock while it runs, so a report that
says "running" beside a free lock is of a job that was killed. A sweep's sweep.json says which jobs
it has: one without a folder never started.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moe_lab.files import DRY_RUN, HYDRA, LOCK, LOG, REPORT, SWEEP
from moe_lab.locks import held
from moe_lab.report.report import AROUND_STAGES, OK, Report, job_order, read_report
from moe_lab.types import UserError

FAILED, KILLED, RUNNING, NOT_STARTED = "failed", "killed", "running", "missing"
REHEARSED = "dry run"  # asked what it would cost, and never started
STATUSES = OK, FAILED, KILLED, RUNNING, NOT_STARTED, REHEARSED
STARTING = 60.0  # seconds from Hydra's first files to a job's first report, imports and all
KEY = re.compile(r"\b[0-9a-f]{12}\b")  # as the store's keys and fingerprints are written
INSIDE = re.compile(
    r"\.|(wandb|diagnosis|plans|checkpoint|reproduced)$|[0-9a-f]{12}$"
)  # no jobs in these
WHERE = re.compile(
    r"\+*(hydra\..+|run_dir|store|resume|dry_run)="
)  # overrides that are no settings


@dataclass(frozen=True)
class SweepRecord:
    """A sweep's command as its sweep.json has it; overrides: of each job, None where unknown."""

    folder: Path
    argv: tuple[str, ...]
    cwd: Path
    script: Path
    python: Path
    overrides: tuple[tuple[str, ...], ...] | None


@dataclass(frozen=True)
class Job:
    """One job; overrides, report: None where it left none; sweep: None for a run by itself."""

    folder: Path
    status: str
    sweep: SweepRecord | None
    overrides: tuple[str, ...] | None
    report: Report | None

    @property
    def _told(self) -> Mapping[str, Any]:
        """Its report; empty where it left none."""
        return self.report or {}

    @property
    def stages(self) -> list[str]:
        """The stages that it finished, in their order."""
        keys = [key for key in self._told if key.startswith("seconds/")]
        names = (key.removeprefix("seconds/") for key in keys)
        return [name for name in names if name not in AROUND_STAGES]

    @property
    def artifacts(self) -> dict[str, str]:
        """The results it uses by stage, each as <kind>/<key>."""
        keys = [key for key in self._told if key.startswith("artifact/")]
        return {key.removeprefix("artifact/"): str(self._told[key]) for key in keys}

    @property
    def tells_results(self) -> bool:
        """Whether it names all results it uses; jobs from before reports did so do not."""
        if self.report is None:
            return self.status == NOT_STARTED or self.sweep is not None
        nothing = self.status == OK and not self.stages
        return not nothing and self.artifacts.keys() >= set(self.stages)

    def seconds(self, cached: bool) -> float:
        """What its stages took that were found finished, or those that it made itself."""
        total: float = sum(
            self._told[f"seconds/{stage}"]
            for stage in self.stages
            if bool(self._told.get(f"cached/{stage}")) == cached
        )
        return total

    @property
    def num_cached(self) -> int:
        """How many of its stages were found finished."""
        return sum(bool(self._told.get(f"cached/{stage}")) for stage in self.stages)

    @property
    def elapsed(self) -> float | None:
        """Seconds it took; so far while it runs, to its last sign of life if it was killed."""
        total: float | None = self._told.get("seconds/total")
        start = _modified(self.folder / HYDRA / "config.yaml")
        if total is not None and self.status != RUNNING:
            return total
        if start is None or self.status == NOT_STARTED:
            return None
        signs = (_modified(self.folder / name) for name in (REPORT, LOG))
        now = time.time() if self.status == RUNNING else max(filter(None, signs), default=start)
        return max(0.0, now - start)

    @property
    def note(self) -> str:
        """Why it failed, what it is doing, or that its report is torn, in one line; else empty."""
        if self.status == RUNNING:
            return _last_line(self.folder / LOG)
        if self.report is None and (self.folder / REPORT).is_file():
            return f"{REPORT} cannot be read"
        error = self._told.get("error") if self.status == FAILED else None
        return " ".join(str(error or "").split())

    @cached_property
    def mentioned(self) -> set[str]:
        """Every key and fingerprint in its report and config, such as a model from the store."""
        config = self.folder / HYDRA / "config.yaml"
        text = json.dumps(self.report) + (config.read_text() if config.is_file() else "")
        return set(KEY.findall(text))


def find_jobs(folder: Path) -> list[Job]:
    """The jobs at or below a folder, 10 after 9; UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    root = folder.resolve()
    folders = list(_folders(root))
    sweeps: dict[Path, SweepRecord | None] = {}
    for one in folders:
        if is_job(one):
            sweeps.setdefault(one.parent, read_sweep(one.parent))
        if (one / SWEEP).is_file():
            sweeps[one] = read_sweep(one)
    jobs = {one: _job(one, sweeps[one.parent]) for one in folders if is_job(one)}
    for home, sweep in sweeps.items():
        if sweep and home.is_relative_to(root):  # not where one of its jobs alone is asked for
            for number in range(len(sweep.overrides or ())):
                jobs.setdefault(home / str(number), _job(home / str(number), sweep))
    if not jobs:
        raise UserError(
            f"{folder} has no runs: no {REPORT}, {HYDRA} or {SWEEP} is in it or below it; "
            "runs lie in outputs/runs/ unless run_dir= or hydra.sweep.dir= says otherwise"
        )
    return [jobs[one] for one in sorted(jobs, key=job_order)]


def is_job(folder: Path) -> bool:
    """Whether a job has been started in a folder."""
    return (folder / REPORT).is_file() or (folder / HYDRA).is_dir()


def read_sweep(folder: Path) -> SweepRecord | None:
    """What sweep.json says in a folder, None where there is none; UserError if it is not whole."""
    path = folder / SWEEP
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        jobs = said["overrides"]
        jobs = None if jobs is None else tuple(tuple(map(str, job)) for job in jobs)
        cwd, script, python = (Path(said[name]) for name in ("cwd", "script", "python"))
        return SweepRecord(folder, tuple(map(str, said["argv"])), cwd, script, python, jobs)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error


def read_yaml(path: Path) -> Any:
    """A YAML file's content, None where there is no such file; UserError if it is not whole."""
    if not path.is_file():
        return None
    try:
        return yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)  # 15 times as fast
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {told}. Move the folder away") from error


def settings_apart(jobs: Iterable[Job]) -> dict[Path, str]:
    """What each job is: the overrides that differ between the jobs of its folder, or all of one."""
    homes: dict[Path, list[tuple[Path, list[str]]]] = {}
    for job in jobs:
        own = [one for one in job.overrides or () if not WHERE.match(one)]
        homes.setdefault(job.folder.parent, []).append((job.folder, own))
    labels: dict[Path, str] = {}
    for members in homes.values():
        told = apart([own for _, own in members])
        labels |= {job: told for (job, _), told in zip(members, told, strict=True)}
    return labels


def apart(every: Sequence[Sequence[str]]) -> list[str]:
    """Of each job's overrides those that not all jobs have, as text; of a single one all."""
    known = [set(own) for own in every if own]
    shared = set.intersection(*known) if len(known) > 1 else set()
    return [" ".join(one for one in own if one not in shared) for own in every]


def _folders(root: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(root):
        below[:] = [name for name in below if not INSIDE.match(name)]
        yield Path(place)


def _job(folder: Path, sweep: SweepRecord | None) -> Job:
    said = _report(folder)
    number = int(folder.name) if sweep and folder.name.isdecimal() else -1
    known = sweep.overrides if sweep else None
    overrides: tuple[str, ...] | None
    if known and 0 <= number < len(known):
        overrides = known[number]
    else:
        own = read_yaml(folder / HYDRA / "overrides.yaml")
        overrides = None if own is None else tuple(map(str, own))
    return Job(folder, _status(folder, said), sweep, overrides, said)


def _report(folder: Path) -> Report | None:
    """A job's report; None where it left none that can be read."""
    try:
        return read_report(folder) if (folder / REPORT).is_file() else None
    except UserError:
        return None


def _status(folder: Path, said: Report | None) -> str:
    if held(folder / LOCK):
        return RUNNING  # whatever an earlier attempt reported
    if said is not None:
        return KILLED if said.get("status") == RUNNING else str(said.get("status"))
    if (folder / DRY_RUN).is_file():
        return REHEARSED
    start = _modified(folder / HYDRA / "config.yaml")
    if start is None:
        return KILLED if (folder / HYDRA).is_dir() else NOT_STARTED
    return RUNNING if time.time() - start < STARTING else KILLED


def _modified(path: Path) -> float | None:
    return path.stat().st_mtime if path.is_file() else None


def _last_line(path: Path) -> str:
    """The last line of a log, read from its end: logs of days are long."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
