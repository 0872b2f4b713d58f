"""A sweep around its jobs: what was asked for at its start, tables, pictures and a page at its end.

Beside run.py the only file that knows Hydra, and as light: `--help` imports it.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from moe_lab import processes, stopping
from moe_lab.files import CHECKOUT, HYDRA, PAGE, REPORT, SWEEP
from moe_lab.option import word_of
from moe_lab.runs import worker
from moe_lab.runs.composing import compose_once
from moe_lab.runs.options import EARLY, check_early, check_whole
from moe_lab.runs.refusals import USER_MISTAKE, refusal
from moe_lab.types import UserError

if TYPE_CHECKING:
    import pandas as pd

    from moe_lab.runs.settings import Description, Place


class Sweep(Callback):
    """Hydra's callback around all jobs; run.py asks the one that started for its end.

    A launcher may run the jobs in other processes, or on other machines; this is where they began.
    """

    started: Sweep | None = None
    job: Path | None = None  # the folder of the job that was begun last

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        """Refuse what can be refused at once, before Hydra makes the run's folder."""
        with _told():
            _agree(config)
            names = [str(name) for name in config if name != "hydra"]
            check_whole(names, config.hydra.runtime.choices)
            check_early({name: _plain(config[name]) for name in EARLY})
            _check_place_of_dry_run(config, config.run_dir, REPORT)

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Write sweep.json: how to run this again, and the overrides of each job."""
        with stopping.hold():
            importlib.import_module("moe_lab.tables.outputs")  # now: a sweep may outlive an update
        stopping.check()
        self.config = config
        of_jobs = jobs(config)
        with _told():
            _agree(config)
            if of_jobs == []:
                raise UserError(
                    "this sweep has no jobs: one of its options has no values (as seed=range(0,0))"
                )
            if config.dry_run and of_jobs is None:
                raise UserError(
                    "dry_run=true foresees no objectives for a sweeper to choose by: foresee one "
                    "job, or a grid of values by Hydra's own sweeper (hydra/sweeper=basic)"
                )
            _check_place_of_dry_run(config, config.hydra.sweep.dir, SWEEP)
            self.folder = _made(config.hydra.sweep.dir)
        if not self.elsewhere:
            compose_once(GlobalHydra.instance().config_loader())
        if not processes.is_main():
            return
        Sweep.started, self.num_jobs = self, len(of_jobs or ())
        asked = {
            "argv": sys.argv[1:],
            "cwd": os.getcwd(),
            "script": str(Path(sys.argv[0]).resolve()),
            "python": sys.executable,
            "overrides": of_jobs,
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._tell_of_earlier_jobs(len(asked["overrides"] or ()))
        (self.folder / SWEEP).write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
        if self.elsewhere:
            self._prepare_launcher()

    @property
    def elsewhere(self) -> bool:
        """Whether a launcher runs the jobs in processes of their own."""
        return not str(self.config.hydra.launcher._target_).endswith("BasicLauncher")

    def _prepare_launcher(self) -> None:
        """Its processes import what this one does, and stop with it; say how to look at them."""
        paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        chosen = self.config.hydra.runtime.choices["hydra/launcher"]
        look = shlex.join(["python", "-m", "moe_lab.runs", str(self.folder)])
        print(f"jobs run by hydra/launcher={chosen}; to look at them: {look}", flush=True)
        if not str(self.config.hydra.launcher._target_).endswith("SlurmLauncher"):
            stopping.do_instead(lambda _: worker.stop_jobs(self.folder))

    def on_job_start(self, config: DictConfig, **_: object) -> None:
        """In a process that a launcher started: take the signals as run.py does."""
        if "config" not in vars(self) or not self.elsewhere:  # a single run has no sweep
            return
        worker.enter()
        folder = Path(config.hydra.runtime.output_dir)
        if stopping.asked() and not (folder / REPORT).is_file():
            shutil.rmtree(folder / HYDRA)  # it does not begin: else it counts as starting

    def tell_of_lost(self, error: Exception) -> bool:
        """Where a launcher's jobs ended the sweep: say why, and wait for the others.

        False where it is no launcher's error.
        """
        if not self.elsewhere or refusal(error) is not None:
            return False
        told = traceback.format_exception_only(error)[-1].strip()
        if not any(self.folder.glob(f"*/{HYDRA}")):
            raise UserError(f"the launcher started no job: {told}")
        print(f"a job was lost: {told}", file=sys.stderr)
        worker.wait_for_others(self.folder)
        return True

    def _tell_of_earlier_jobs(self, number: int) -> None:
        """Where the folder has jobs beyond this sweep's: nobody's results are deleted here."""
        names = [one.parent.name for one in self.folder.glob(f"*/{REPORT}")]
        earlier = sum(name.isdecimal() and int(name) >= number for name in names) if number else 0
        if earlier:
            print(
                f"{self.folder} has {earlier} more jobs, of an earlier sweep: its table will have "
                "them too; for one without them choose another hydra.sweep.dir=<folder>"
            )

    def end(self) -> int:
        """Tables, pictures and page into the sweep's folder, and what there is to say; exit code.

        0 where all jobs went well, else 1. Nothing is made where no job came so far as a report.
        """
        from moe_lab.progress import duration
        from moe_lab.report.frame import STATUS, read_reports, report_folders
        from moe_lab.report.report import OK
        from moe_lab.tables.outputs import write_outputs

        if self.config.dry_run:
            return self._end_of_dry_run()
        if not report_folders(self.folder):
            return 1
        store = Path(str(self.config.store))
        written, shown = write_outputs(
            self.folder,
            instantiate(self.config.table, _convert_="object"),
            store if store.is_dir() else None,
        )
        for table in shown:
            table.show()
        frame = read_reports(self.folder)
        self._track(frame, written)
        ended = frame[STATUS].value_counts()
        told = ", ".join(f"{number} {status}" for status, number in ended.items())
        took = frame["seconds/total"].sum() if "seconds/total" in frame else 0.0
        print(f"{len(frame)} jobs: {told}; {duration(took)} of work")
        if good := set(ended.index) == {OK}:
            print(f"look at it: {self.folder / PAGE}")
        else:
            print(self.how_to_go_on())
        names = sorted({path.relative_to(self.folder).parts[0] for path in written})
        print(f"sweep: {self.folder} ({', '.join(names)})")
        return int(not good)

    def _end_of_dry_run(self) -> int:
        """Say what all jobs would cost together; 2 where one is refused."""
        from moe_lab.runs import rehearsal

        folders = [self.folder / str(number) for number in range(self.num_jobs)]
        folders = folders or sorted(self.folder.iterdir())  # of a sweeper that is not Hydra's own
        told = [figures for folder in folders if (figures := rehearsal.read(folder))]
        print(rehearsal.sweep_line(told))
        return USER_MISTAKE if any(figures["refused"] for figures in told) else 0

    def how_to_go_on(self) -> str:
        """The command that does what is not done."""
        return f"once more, the others alone: {_again(self.folder)}"

    def _track(self, frame: pd.DataFrame, written: list[Path]) -> None:
        """A run of its own in the sweep's group: the table, the pictures, the page."""
        tracker = instantiate(self.config.track)
        name = self.folder.name
        same = {"jobs": len(frame), "argv": " ".join(sys.argv[1:])}
        tags = sorted(set(frame["model"].dropna()) | {"sweep"})
        identity = f"summary of {frame['run_id'].iloc[0]}"
        tracker.start(self.folder, same, name, f"summary of {name}", tags, identity, "sweep")
        tracker.table("reports", list(frame), frame.astype(object).to_numpy().tolist())
        tracker.images(path for path in written if path.suffix == ".png")
        for path in written:
            if path.suffix == ".html":
                tracker.html("page", path)
            elif path.suffix in (".md", ".csv", ".tex"):
                tracker.artifact(path, f"{path.stem}-{name}", "table")
        tracker.finish(0)


def how_to_go_on() -> str:
    """The command after a signal: of the sweep, of the job, or the same where none has begun."""
    if Sweep.started:
        return Sweep.started.how_to_go_on()
    if Sweep.job and (Sweep.job / REPORT).is_file():
        return f"to go on: {_again(Sweep.job)}"
    return f"to begin again: {shlex.join(['python', *sys.argv])}"


def _again(folder: Path) -> str:
    return shlex.join(["python", "-m", "moe_lab.runs", str(folder), "--rerun"])


@contextmanager
def _told() -> Iterator[None]:
    """Refusals end the process: Hydra makes warnings of what a callback raises."""
    try:
        yield
    except Exception as error:
        message = refusal(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        raise SystemExit(USER_MISTAKE) from error


def _agree(config: DictConfig) -> None:
    """Have all processes work in one folder: times in its name are those of the main one's clock.

    UserError for jobs that something else than Hydra's own loop hands out: each process would.
    """
    if processes.number() == 1:
        return
    for kind in ("launcher", "sweeper"):
        target = str(config.hydra[kind]._target_)
        if not target.rpartition(".")[2].startswith("Basic"):
            raise UserError(
                f"hydra/{kind}={config.hydra.runtime.choices[f'hydra/{kind}']} hands out jobs, and "
                f"{processes.number()} processes were started that share each: start this sweep "
                "once, without torchrun or accelerate, or leave the option out"
            )
    _ = (config.run_dir, config.hydra.sweep.dir, config.hydra.run.dir)  # now they are known
    OmegaConf.set_cache(config, processes.broadcast(dict(OmegaConf.get_cache(config))))


def _check_place_of_dry_run(config: DictConfig, folder: object, file: str) -> None:
    """Refuse a dry run where it would write over what tells of real results."""
    if config.dry_run and (Path(str(folder)) / file).is_file():
        raise UserError(
            f"dry_run=true: {folder} has the {file} of a real run, which a dry run would make "
            "another's: leave run_dir and hydra.sweep.dir out; the store tells what is left to do"
        )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _made(folder: object) -> Path:
    """The sweep's folder; UserError where none can be made."""
    if not isinstance(folder, str) or not folder.strip():
        raise UserError(
            f"hydra.sweep.dir={word_of(folder)}: it must be a folder, for all jobs of the sweep"
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def jobs(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each job, in order; None for another sweeper than Hydra's own."""
    sweeper = config.hydra.sweeper
    if not str(sweeper._target_).endswith("BasicSweeper"):
        return None
    lines = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    given: Any = OmegaConf.to_container(config.hydra.overrides.task)
    lines += given
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (of_jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(lines), None)
    return of_jobs


def description_of(config: DictConfig) -> Description:
    """The job that Hydra is at, as its sweep knows it."""
    from moe_lab.runs.settings import Description

    plain: Any = OmegaConf.to_container(config, resolve=True)  # names the option, else Hydra's own
    around = HydraConfig.get()
    folder = Sweep.job = Path(around.runtime.output_dir)
    # A single job that is put into a sweep's folder is none of its own.
    where = place(folder) if around.mode == RunMode.MULTIRUN else None
    named = where.told if where else around.job.override_dirname
    choices = dict(around.runtime.choices)
    name = named or config.model.name
    return Description(folder, folder.parent.name, name, choices, plain, where)


def place(folder: Path) -> Place | None:
    """A job's place by its folder <sweep>/<number>; None where that is no sweep's."""
    from moe_lab.runs.settings import Place
    from moe_lab.runs.status import apart, read_sweep

    asked = read_sweep(folder.parent)
    if asked is None or not folder.name.isdecimal():
        return None
    number, every = int(folder.name), asked.overrides or ()
    told = apart(every)[number] if number < len(every) else ""
    return Place(number, len(every) or None, told or f"job {number}")
