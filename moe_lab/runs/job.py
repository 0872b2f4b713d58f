"""A job around the pipeline: its report, table, tracking and model cards, also when it fails."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_lab import locks, processes, stopping
from moe_lab.console import terminal
from moe_lab.files import CURVE, LOCK, LOG, MODEL_CARD, PLAN, PLOTS, REPORT, USAGE
from moe_lab.progress import duration
from moe_lab.report.card import model_card
from moe_lab.report.figures import VARIANTS
from moe_lab.report.frame import REQUEST
from moe_lab.report.plots.kept import run_pictures
from moe_lab.report.plots.run import draw_run
from moe_lab.report.report import OK, Report, read_report, write_report
from moe_lab.report.summary import (
    result_markdown,
    result_rows,
    result_table,
    stage_rows,
    stages_table,
    summary_line,
)
from moe_lab.runs.moved import refusal_of_import
from moe_lab.runs.refusals import NO_ROOM
from moe_lab.runs.settings import (
    Description,
    planned_layers,
    report_head,
    settings_of_report,
    tags_of,
)
from moe_lab.track import artifacts
from moe_lab.track.tracker import Tracker, flat
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
SIGNALLED = 128  # an exit code beyond it: so much more than a signal's number


def run(job: Description, tracker: Tracker, work: Callable[[dict[str, Any]], None]) -> int:
    """Do the work and report it; 0 if it went well, 2 for a user's mistake, 1 for a failure.

    While it runs, the job holds a lock in its folder: a report that says "running" beside a free
    lock is that of a killed job. Of several processes the main one does all this, and the others
    the work alone; all give its exit code, and stop where a signal stopped it.
    """
    logging.captureWarnings(True)
    code = 1
    try:
        code = _run(job, tracker, work) if processes.is_main() else _beside(work)
    except KeyboardInterrupt as stop:
        code = stopping.exit_code(stop)
        processes.failed(stop, f"stopped by {stopping.name_of(stop)}", code, code - SIGNALLED)
        raise
    except Exception as error:
        processes.failed(error, str(error), 1)
        raise
    finally:
        code = processes.end_job(code)
    if code > SIGNALLED:
        raise stopping.Stopped(code - SIGNALLED)
    return code


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """The folder of a run; for all but the main process one of their own, for nobody to read."""
    if processes.is_main():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="moe_lab_") as own:
        yield Path(own)


def _beside(work: Callable[[dict[str, Any]], None]) -> int:
    """A job in another process than the main one, which says whether there is anything to do."""
    return _guarded(work, {}) if processes.broadcast(False) else 0


def _run(job: Description, tracker: Tracker, work: Callable[[dict[str, Any]], None]) -> int:
    before = _report_before(job.folder)
    report = report_head(job)
    same = before.get(REQUEST) == report[REQUEST]
    if job.config["resume"] and same and before["status"] == "ok":
        logger.info("%s: done before", job.place or job.folder)
        processes.broadcast(False)
        return 0
    # A restarted job goes on with its tracker's run; the same folder asked for more begins another.
    report["run_id"] = (same and before.get("run_id")) or uuid.uuid4().hex[:16]
    with locks.taken(job.folder / LOCK, patient=True) as lock:
        if lock is None:
            by = locks.holder_of(job.folder / LOCK)
            who = f"another run ({by})" if by else "another run"
            logger.error("%s is being written by %s: choose another run_dir", job.folder, who)
            processes.broadcast(False)
            return 2
        try:
            return _tracked(job, tracker, work, report)
        finally:
            lock.remove()


_ended: list[float] = []  # when jobs of this process did, in seconds since the epoch


def _begun() -> float:
    """When a job's time began: with its process, or when the job before it ended there."""
    import psutil

    return _ended[-1] if _ended else psutil.Process().create_time()


def _report_before(folder: Path) -> Report:
    """The report of a job that was here before; one that cannot be read is none."""
    if not (folder / REPORT).is_file():
        return {}
    try:
        return read_report(folder)
    except UserError as error:
        logger.warning("%s: it is written anew", error)
        return {}


def _tracked(
    job: Description,
    tracker: Tracker,
    work: Callable[[dict[str, Any]], None],
    report: dict[str, Any],
) -> int:
    started = _begun()
    for copied in (CURVE, USAGE):  # of what was asked for here before: it would be taken for ours
        (job.folder / copied).unlink(missing_ok=True)
    write_report(job.folder, report)
    if job.place:
        logger.info("%s: %s", job.place, job.place.told)
    config = flat(job.config) | settings_of_report(report)
    tracker.start(job.folder, config, job.sweep, job.name, tags_of(job), identity=report["run_id"])
    report |= {"url": tracker.url} if tracker.url else {}
    code = 1
    report["seconds/start"] = round(time.time() - started, 3)
    try:
        processes.broadcast(True)
        code = _guarded(work, report)
    except KeyboardInterrupt as stop:
        report["error"] = f"stopped by {stopping.name_of(stop)}"
        logger.error("%s", report["error"])
        raise
    finally:
        # Also after a signal, and not left by a further one: what is known so far is not lost.
        with stopping.hold():
            report["status"] = OK if code == 0 else "failed"
            report |= planned_layers(job.folder) if code == 0 else {}
            write_report(job.folder, report)
            drawn = _drawn(job, report)
            report["seconds/total"] = round(time.time() - started, 3)
            write_report(job.folder, report)
            if code == 0:
                _write_cards(job, report)
            _track(job, tracker, report, drawn)
            tracker.finish(code)
            _ended.append(time.time())
    _show(job, report)
    stopping.check()  # of one that came behind the work: a sweep's next job is not begun
    return code


def _guarded(work: Callable[[dict[str, Any]], None], report: dict[str, Any]) -> int:
    try:
        work(report)
        processes.wait()
    except Exception as error:
        stopping.check()  # what a signal broke off may end in any way
        mistake = _mistake(error)
        told = str(mistake or f"{type(error).__name__}: {error}")
        failure = processes.failed(error, told, 2 if mistake else 1)
        if failure.signal:
            raise stopping.Stopped(failure.signal) from error
        report["error"] = failure.message
        if processes.is_main():
            _tell(failure)
        return failure.code
    return 0


def _tell(failure: processes.Failure) -> None:
    """Log what ended the job, with the traceback of what is no mistake of the user's."""
    if failure.code == 2:
        logger.error("%s", failure.message)
        return
    where = f" in process {failure.process}" if failure.process else ""
    logger.error("the job failed%s: %s\n%s", where, failure.message, failure.traceback.rstrip())


def _mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake in an error, also where a library wrapped it."""
    cause = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, OSError) and (told := _no_room(cause)):
            return UserError(told)
        cause = cause.__cause__ or cause.__context__
    return refusal_of_import(error)


def _no_room(error: OSError) -> str | None:
    """Which file found no room on its disk, and why; of a copied folder, which has many, the first.

    None for any other error.
    """
    if error.errno in NO_ROOM:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}"
    words = tuple(map(os.strerror, NO_ROOM))
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        for _, place, why in error.args[0]:
            if any(word in why for word in words):
                return f"{place} cannot be written: {next(word for word in words if word in why)}"
    return None


def _track(
    job: Description, tracker: Tracker, report: dict[str, Any], drawn: Sequence[Path]
) -> None:
    """Log all of a job that was not logged while it ran; drawn: its pictures."""
    curve = job.folder / CURVE
    for line in curve.read_text().splitlines() if curve.is_file() else ():
        tracker.log_curve(json.loads(line))
    tracker.summary(report)
    head, *rows = result_rows(report)
    if rows and len(head) > 1:
        tracker.table("result", ["figure", *head[1:]], rows)
    tracker.images(path for path in drawn if path.suffix == ".png")
    tracker.artifacts(artifacts.tracked_artifacts(report, job.store))


def _drawn(job: Description, report: dict[str, Any]) -> list[Path]:
    """The run's pictures, noting what they took; a failure to draw is told and costs nothing else.

    Of a run that was stopped none: its time may be up soon, and it goes on.
    """
    if stopping.asked():
        return []
    started = time.perf_counter()
    try:
        if report["status"] == OK:
            return run_pictures(job.folder, report, job.store)
        return draw_run(job.folder)  # perhaps there is no store to keep them in
    except Exception:  # a picture is no result
        logger.exception("the pictures of %s were not drawn", job.folder)
        return []
    finally:
        report["seconds/pictures"] = round(time.perf_counter() - started, 3)


def _write_cards(job: Description, report: dict[str, Any]) -> None:
    for variant in VARIANTS[1:]:
        folder = report.get(f"{variant}/checkpoint")
        if folder:
            text = model_card(variant, report, job.config, result_markdown(report))
            (Path(folder) / MODEL_CARD).write_text(text)


def _show(job: Description, report: dict[str, Any]) -> None:
    """One line for a job of a sweep, whose table follows; else the results in full."""
    if job.place:  # the reason of a failure stands in the line before
        took, told = duration(report["seconds/total"]), summary_line(report)
        logger.info("%s: %s in %s%s", job.place, report["status"], took, told and f"; {told}")
        return
    console = terminal()
    if len(result_rows(report)) > 1:
        console.print(result_table(report))
    if len(stage_rows(report)) > 1:
        console.print(stages_table(report))
    for variant in VARIANTS:
        if f"{variant}/checkpoint" in report:
            console.print(f"{variant:>10}: {report[f'{variant}/checkpoint']}", soft_wrap=True)
    names = (REPORT, PLAN, LOG, PLOTS)
    files = [name for name in names if (job.folder / name).exists()]
    console.print(f"{'run':>10}: {job.folder} ({', '.join(files)})", soft_wrap=True)
