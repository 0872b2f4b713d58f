"""Running the unfinished jobs of sweeps and single runs again, with the commands that made them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lab import stopping
from moe_lab.files import CHECKOUT, HYDRA, SWEEP
from moe_lab.report.report import OK
from moe_lab.runs.quoting import override
from moe_lab.runs.status import RUNNING, Job, SweepRecord, read_yaml
from moe_lab.types import UserError

SCRIPT = CHECKOUT / "run.py"
SWEEP_FLAGS = ("-m", "--multirun")
CONFIG_FLAG = "--config-dir"
# What a launcher's jobs are given; all else of it could name a program, a place or a shell's line.
RESOURCES = re.compile(
    r"hydra\.launcher\.(n_jobs|timeout_min|signal_delay_s|max_num_timeout|array_parallelism|nodes"
    r"|tasks_per_node|cpus_per_(task|gpu)|gpus_per_(node|task)|mem_(gb|per_gpu|per_cpu)|partition"
    r"|qos|constraint|exclude|gres|account|stderr_to_stdout|ray\.remote\.num_[cg]pus)"
)
NAMES_CODE = ("hydra.callbacks", "hydra.searchpath", "hydra.job.env", "hydra.job_logging",
              "hydra.hydra_logging")  # fmt: skip
OLD_SWEEP = "multirun.yaml"  # which Hydra leaves in the folder of every sweep


@dataclass(frozen=True)
class Command:
    """What runs the unfinished jobs of one sweep, or one run, again in its folder."""

    folder: Path
    jobs: tuple[Job, ...]
    words: tuple[str, ...]
    cwd: Path

    def run(self) -> int:
        """Run it to its end, its output going where ours goes; its exit code."""
        with (
            subprocess.Popen(self.words, cwd=self.cwd) as process,
            stopping.passed_on(lambda number: process.send_signal(number)),
        ):
            while True:
                try:
                    code = process.wait()
                except KeyboardInterrupt:  # it has been told too, and still writes its report
                    continue
                return 128 - code if code < 0 else code


def commands(folder: Path, jobs: list[Job]) -> list[Command]:
    """What runs the unfinished jobs below a folder again, a command for each sweep or single run.

    Sweeps leave out their finished jobs by themselves (resume=true). UserError for a job whose
    command nobody wrote down, for one of a sweep's jobs alone, and while a sweep is running.
    """
    homes: dict[Path, list[Job]] = {}
    for job in jobs:
        homes.setdefault(job.sweep.folder if job.sweep else job.folder, []).append(job)
    made = []
    for home, members in homes.items():
        unfinished = tuple(job for job in members if job.status not in (OK, RUNNING))
        if unfinished:
            _check(home, folder.resolve(), members)
            words, cwd = _of_sweep(members[0].sweep) if members[0].sweep else _of_run(members[0])
            made.append(Command(home, unfinished, tuple(words), cwd))
    return made


def _check(home: Path, asked: Path, members: list[Job]) -> None:
    sweep = members[0].sweep
    if sweep and home in asked.parents:
        raise UserError(
            f"{asked} is one job of a sweep, which only runs as a whole, its finished jobs left "
            f"out: python -m moe_lab.runs {home} --rerun"
        )
    if not sweep and (home.parent / OLD_SWEEP).is_file():
        raise UserError(
            f"{home} is a job of a sweep from before sweeps left {SWEEP}, so its command is not "
            "known: give it again with "
            f"{override('hydra.sweep.dir', str(home.parent))} resume=true, or name another folder "
            "here"
        )
    if busy := [job.folder.name for job in members if job.status == RUNNING]:
        raise UserError(
            f"{home} is still running (job {', '.join(busy)}): wait for its end, or stop it; or "
            "name another folder"
        )


def _of_sweep(sweep: SweepRecord) -> tuple[list[str], Path]:
    if not sweep.cwd.is_dir():
        raise UserError(
            f"{sweep.folder / SWEEP} was written in {sweep.cwd}, which is not there now: correct "
            "cwd in that file"
        )
    own = without(sweep.argv, "hydra.sweep.dir", "resume", "dry_run")
    check_recorded(own, sweep.folder / SWEEP, sweep.cwd)
    where = override("hydra.sweep.dir", str(sweep.folder))
    return [sys.executable, str(SCRIPT), *own, where, "resume=true"], sweep.cwd


def other_program(sweep: SweepRecord) -> str | None:
    """What of sweep.json's program is not what runs it again: ours, whatever a file says."""
    said = {"python": (sweep.python, Path(sys.executable)), "script": (sweep.script, SCRIPT)}
    others = [f"{name} {then}" for name, (then, now) in said.items() if not _same(then, now)]
    if not others:
        return None
    return f"{sweep.folder / SWEEP} names {' and '.join(others)}: not used, but this one's own"


def _same(one: Path, other: Path) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def check_recorded(words: Sequence[str], source: Path, cwd: Path) -> None:
    """Refuse what is no override of this checkout's options, and could name code of others.

    A folder of options of one's own (--config-dir) is passed on where the command is given in the
    folder that it was given in first, `cwd`, and it lies there.
    """
    waiting = iter(words)
    for word in waiting:
        flag, equals, folder = word.partition("=")
        if flag == CONFIG_FLAG:
            why = _other_options(folder if equals else next(waiting, ""), cwd)
        else:
            why = _other_code(word)
        if why:
            command = shlex.join(["python", "run.py", *words])
            raise UserError(
                f"{source} has {word!r}, which is not passed on: {why}. If the command is yours, "
                f"give it yourself: {command}"
            )


def _other_options(folder: str, cwd: Path) -> str | None:
    """Why a folder of options is not one's own; None where it is."""
    here = Path.cwd().resolve()
    if cwd.resolve() == here and folder and (cwd / folder).resolve().is_relative_to(here):
        return None
    return f"it names a folder that is not below {Path.cwd()}, or it was given elsewhere"


def _other_code(word: str) -> str | None:
    """Why a word is no override that can be passed on; None where it is."""
    if word in SWEEP_FLAGS:
        return None
    if word.startswith("-") or ("=" not in word and not word.startswith("~")):
        return "it is no override (key=value)"
    key = word.lstrip("+~").partition("=")[0]
    if key.startswith("hydra.launcher") and not RESOURCES.fullmatch(key):
        return "it can name code"
    if key.startswith(NAMES_CODE) or "_target_" in word or "\n" in word:
        return "it can name code"
    return None


def _of_run(job: Job) -> tuple[list[str], Path]:
    if job.overrides is None:
        raise UserError(
            f"{job.folder} has no {HYDRA}/overrides.yaml, so it is not known how it was started"
        )
    cwd = working_folder(job)
    own = without(job.overrides, "run_dir")
    check_recorded(own, job.folder / HYDRA / "overrides.yaml", cwd)
    return [sys.executable, str(SCRIPT), *own, override("run_dir", str(job.folder))], cwd


def working_folder(job: Job) -> Path:
    """Where it ran: relative paths of its options begin there. UserError where that is gone."""
    said = read_yaml(job.folder / HYDRA / "hydra.yaml") or {}
    cwd = Path(said.get("hydra", {}).get("runtime", {}).get("cwd") or Path.cwd())
    if not cwd.is_dir():
        raise UserError(f"{job.folder} was run from {cwd}, which is not there now")
    return cwd


def without(words: tuple[str, ...], *keys: str) -> list[str]:
    """The command's words without overrides of these keys, also those written +key= or ++key=."""
    return [word for word in words if word.lstrip("+").partition("=")[0] not in keys]
