"""A job around the pipeline: its report, table, tracking and model cards, also when it fails."""

from __future__ import annotations

import errno
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from moe_lab import card, lineage, pictures, report
from moe_lab.jobs import LOCK
from moe_lab.logbook import Logbook, flat, stable_hash
from moe_lab.progress import duration
from moe_lab.reports import REQUEST, RESULTS
from moe_lab.stages import CURVE, USAGE
from moe_lab.store import commit
from moe_lab.types import Plan, UserError

logger = logging.getLogger(__name__)
RECIPE_OPTIONS = (
    "top_k", "entropy", "annealing", "annealed_at", "trains", "windows", "beta", "force",
    "distillation", "temperature", "teacher_top_k",
)  # fmt: skip
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


NOT_ASKED = ("store", "run_dir", "compute", "track", "table", "resume")  # of no result's making


@dataclass(frozen=True)
class Place:
    """A job's place in its sweep: its folder's number, of how many, and what sets it apart."""

    number: int
    total: int | None
    told: str

    def __str__(self) -> str:
        return f"job {self.number}" + (f" [{self.number + 1}/{self.total}]" if self.total else "")


@dataclass(frozen=True)
class Description:
    """A job as its sweep knows it; choices: the option chosen of each config group."""

    folder: Path
    sweep: str
    name: str
    choices: dict[str, str]
    config: dict[str, Any]
    place: Place | None = None

    @property
    def store(self) -> Path:
        """Where its finished stages lie."""
        return Path(self.config["store"])


def run(job: Description, tracker: Logbook, work: Callable[[dict[str, Any]], None]) -> int:
    """Do the work and report it; 0 if it went well, 2 for a user's mistake, 1 for a failure.

    While it runs, the job holds a lock in its folder: a report that says "running" beside a free
    lock is that of a killed job.
    """
    logging.captureWarnings(True)
    before = report.read(job.folder) if (job.folder / report.FILE).is_file() else {}
    found = _head(job)
    same = before.get(REQUEST) == found[REQUEST]
    if job.config["resume"] and same and before["status"] == "ok":
        logger.info("%s: done before", job.place or job.folder)
        return 0
    # A restarted job goes on with its tracker's run; the same folder asked for more begins another.
    found["run_id"] = (same and before.get("run_id")) or uuid.uuid4().hex[:16]
    lock = FileLock(job.folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.error("%s is being written by another run: choose another run_dir", job.folder)
        return 2
    try:
        return _tracked(job, tracker, work, found)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _tracked(
    job: Description,
    tracker: Logbook,
    work: Callable[[dict[str, Any]], None],
    found: dict[str, Any],
) -> int:
    started = time.perf_counter()
    for copied in (CURVE, USAGE):  # of what was asked for here before: it would be taken for ours
        (job.folder / copied).unlink(missing_ok=True)
    report.write(job.folder, found)
    if job.place:
        logger.info("%s: %s", job.place, job.place.told)
    config = flat(job.config) | _settings(found)
    tracker.start(job.folder, config, job.sweep, job.name, _tags(job), identity=found["run_id"])
    found |= {"url": tracker.url} if tracker.url else {}
    code = 1
    try:
        code = _guarded(work, found)
    except KeyboardInterrupt:
        found["error"] = "stopped by Ctrl-C"
        raise
    finally:
        # Also on Ctrl-C: what is known so far is not lost.
        found["status"] = "ok" if code == 0 else "failed"
        found["seconds/total"] = round(time.perf_counter() - started, 3)
        found |= _planned(job.folder) if code == 0 else {}
        report.write(job.folder, found)
        if code == 0:
            _write_cards(job, found)
        _track(job, tracker, found)
        tracker.finish(code)
    _show(job, found)
    return code


def _tags(job: Description) -> list[str]:
    """Model, method, criterion and recipe."""
    groups = ["model", "method", *(["metric"] if job.choices["method"] == "prune" else []),
              "finetune"]  # fmt: skip
    return [job.choices[group] for group in groups if job.choices[group] != "none"]


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """The report's settings, by the names that tables give them."""
    return {key: value for key, value in found.items() if not RESULTS.match(key)}


def _head(job: Description) -> dict[str, Any]:
    method, config = job.choices["method"], job.config
    found: dict[str, Any] = {"status": "running", "error": None}
    found |= {"model": config["model"]["name"], "method": method, "metric": None, "ratio": None}
    own = _options(method, config["condense" if method == "condense" else "method"])
    if method == "prune":
        found |= {"metric": job.choices["metric"]} | _options("metric", config["metric"])
    if method == "prune" or (method == "merge" and f"{method}/num_experts" not in own):
        budget = _options("ratio", config["ratio"])
        share = budget.pop("ratio/ratio", None)
        found |= {"ratio": None if "ratio/target_gib" in budget else share}
        found |= {"ratio_method": job.choices["ratio"]} | budget
    if f"{method}/num_layers" in own:  # one key for all methods, to compare them
        number = own.pop(f"{method}/num_layers")
        found |= {} if own.get(f"{method}/layers") == "all" else {"condense/num_layers": number}
    found |= own
    found |= {key: job.choices[key] for key in ("calibration", "finetune", "eval")}
    found |= _options("calibration", config["calibration"])
    found |= {f"finetune/{key}": _word(config["finetune"][key]) for key in RECIPE_OPTIONS
              if key in config["finetune"]}  # fmt: skip
    found |= {"seed": config["seed"], "commit": commit(), REQUEST: _request(config)}
    return found | {"sweep": job.sweep, "job": job.name}


def _request(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits over all that was asked for; also over what will be refused."""
    asked = {key: value for key, value in config.items() if key not in NOT_ASKED}
    plain = json.loads(json.dumps(asked, default=str))  # keys that are numbers become text
    return stable_hash(json.dumps(plain, sort_keys=True))[:12]


def _options(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The plain options of a group as <name>/<option>, as far as they are given."""
    return {
        f"{name}/{key}": _word(value)
        for key, value in node.items()
        if not key.startswith("_") and value is not None and not isinstance(value, Mapping)
    }


def _planned(folder: Path) -> dict[str, str]:
    """The layers that the run's plan edits, in order of choice where it has one."""
    if not (folder / "plan.json").is_file():
        return {}
    plan = Plan.load(folder / "plan.json")
    return {"plan/layers": json.dumps(plan.layer_order or [edit.index for edit in plan.edited()])}


def _word(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, type(None))) else json.dumps(value)


def _guarded(work: Callable[[dict[str, Any]], None], found: dict[str, Any]) -> int:
    try:
        work(found)
    except Exception as error:
        mistake = _mistake(error)
        found["error"] = str(mistake or f"{type(error).__name__}: {error}")
        if mistake:
            logger.error("%s", mistake)
            return 2
        logger.exception("the job failed: %s", found["error"])
        return 1
    return 0


def _mistake(error: BaseException | None) -> UserError | None:
    """The user's mistake in an error, also where a library wrapped it."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return UserError(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
        error = error.__cause__ or error.__context__
    return None


def _track(job: Description, tracker: Logbook, found: dict[str, Any]) -> None:
    """Log all of a job that was not logged while it ran; pictures are drawn before."""
    drawn = _drawn(job.folder)
    curve = job.folder / CURVE
    for line in curve.read_text().splitlines() if curve.is_file() else ():
        tracker.log_curve(json.loads(line))
    tracker.summary(found)
    head, *rows = report.rows(found)
    if rows and len(head) > 1:
        tracker.table("result", ["figure", *head[1:]], rows)
    tracker.images(path for path in drawn if path.suffix == ".png")
    tracker.lineage(lineage.items(found, job.store))


def _drawn(folder: Path) -> list[Path]:
    """The run's pictures; a failure to draw is told and costs nothing else."""
    try:
        return pictures.of_run(folder)
    except Exception:  # a picture is no result
        logger.exception("the pictures of %s were not drawn", folder)
        return []


def _write_cards(job: Description, found: dict[str, Any]) -> None:
    for variant in ("compressed", "finetuned"):
        folder = found.get(f"{variant}/checkpoint")
        if folder:
            text = card.text(variant, found, job.config, report.markdown(found))
            (Path(folder) / "README.md").write_text(text)


def _show(job: Description, found: dict[str, Any]) -> None:
    """One line for a job of a sweep, whose table follows; else the results in full."""
    if job.place:  # the reason of a failure stands in the line before
        took, told = duration(found["seconds/total"]), report.summary(found)
        logger.info("%s: %s in %s%s", job.place, found["status"], took, told and f"; {told}")
        return
    console = Console()
    if len(report.rows(found)) > 1:
        console.print(report.table(found))
    if len(report.stage_rows(found)) > 1:
        console.print(report.stages_table(found))
    for variant in report.VARIANTS:
        if f"{variant}/checkpoint" in found:
            console.print(f"{variant:>10}: {found[f'{variant}/checkpoint']}", soft_wrap=True)
    names = ("report.json", "plan.json", "run.log", "plots")
    files = [name for name in names if (job.folder / name).exists()]
    console.print(f"{'run':>10}: {job.folder} ({', '.join(files)})", soft_wrap=True)
