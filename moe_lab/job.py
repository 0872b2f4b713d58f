"""A job around the pipeline: its report, table, tracking and model cards, also when it fails."""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_lab import card, report
from moe_lab.store import commit
from moe_lab.track import Tracker
from moe_lab.types import Plan, UserError

logger = logging.getLogger(__name__)
RECIPE_OPTIONS = (
    "top_k", "entropy", "annealing", "annealed_at", "trains", "windows", "beta", "force",
    "distillation", "temperature", "teacher_top_k",
)  # fmt: skip
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Description:
    """A job as its sweep knows it; choices: the option chosen of each config group."""

    folder: Path
    sweep: str
    name: str
    choices: dict[str, str]
    config: dict[str, Any]


def run(job: Description, tracker: Tracker, work: Callable[[dict[str, Any]], None]) -> int:
    """Do the work and report it; 0 if it went well, 2 for a user's mistake, 1 for a failure."""
    logging.captureWarnings(True)
    found = _head(job)
    started = time.perf_counter()
    tags = [job.choices["model"], job.choices["method"]]
    tracker.start(job.folder, job.config, job.sweep, job.name, tags)
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
        _track(job, tracker, found)
        tracker.finish(code)
    if code == 0:
        _write_cards(job, found)
    _show(job, found)
    return code


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
    found |= {"seed": config["seed"], "commit": commit(), "sweep": job.sweep, "job": job.name}
    return found


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


def _track(job: Description, tracker: Tracker, found: dict[str, Any]) -> None:
    for row in _curve(found):
        phase, step = row.pop("phase"), row.pop("step")
        tracker.log({f"finetune/{phase}/{key}": value for key, value in row.items()}, step)
    tracker.summary(found)
    head, *rows = report.rows(found)
    if rows and len(head) > 1:
        tracker.table("result", ["figure", *head[1:]], rows)
    plan = job.folder / "plan.json"
    if plan.is_file():
        tracker.artifact(plan, f"plan-{job.sweep}-{job.folder.name}", "plan")


def _curve(found: dict[str, Any]) -> list[dict[str, float]]:
    checkpoint = found.get("finetuned/checkpoint")
    if checkpoint is None:
        return []
    lines = (Path(checkpoint).parent / "curve.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _write_cards(job: Description, found: dict[str, Any]) -> None:
    for variant in ("compressed", "finetuned"):
        folder = found.get(f"{variant}/checkpoint")
        if folder:
            text = card.text(variant, found, job.config, report.markdown(found))
            (Path(folder) / "README.md").write_text(text)


def _show(job: Description, found: dict[str, Any]) -> None:
    console = Console()
    if len(report.rows(found)) > 1:
        console.print(report.table(found))
    if len(report.stage_rows(found)) > 1:
        console.print(report.stages_table(found))
    for variant in report.VARIANTS:
        if f"{variant}/checkpoint" in found:
            console.print(f"{variant:>10}: {found[f'{variant}/checkpoint']}", soft_wrap=True)
    files = [
        name for name in ("report.json", "plan.json", "run.log") if (job.folder / name).exists()
    ]
    console.print(f"{'run':>10}: {job.folder} ({', '.join(files)})", soft_wrap=True)
