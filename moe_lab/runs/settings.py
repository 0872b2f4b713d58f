"""What a job is and was asked for, as its report says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc import ErrorDuringImport
from typing import Any, TypeGuard

from moe_lab.files import PLAN
from moe_lab.models.edits.plan import Plan
from moe_lab.option import Plugin, plain_options
from moe_lab.provenance import commit, versions
from moe_lab.report.frame import REQUEST, RESULT_KEYS
from moe_lab.runs.options import target_of
from moe_lab.track.tracker import stable_hash
from moe_lab.types import UserError

# Of no result's making.
NOT_ASKED = ("store", "run_dir", "compute", "track", "table", "resume", "objectives", "dry_run")
SAID_OF_MODELS = ("licence", "architecture")  # what the model is, wherever its results come from


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
        return Path(str(self.config["store"]))  # also of one that is about to be refused


def tags_of(job: Description) -> list[str]:
    """Model, method, criterion and recipe."""
    criterion = ["metric"] if "metric" in _groups_of_method(job) else []
    groups = ["model", "method", *criterion, "finetune"]
    return [job.choices[group] for group in groups if job.choices[group] != "none"]


def settings_of_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report's settings, by the names that tables give them."""
    return {key: value for key, value in report.items() if not RESULT_KEYS.match(key)}


def report_head(job: Description) -> dict[str, Any]:
    """What a report says before its job begins: the settings and where it comes from.

    What is asked for need not be right: jobs that will be refused are told apart, too.
    """
    config = job.config
    head: dict[str, Any] = {"status": "running", "error": None}
    head |= {"model": _word(config["model"]["name"]), "method": job.choices["method"]}
    head |= {"metric": None, "ratio": None} | _method(job)
    head |= {key: job.choices[key] for key in ("calibration", "finetune", "eval")}
    head |= _told("calibration", config["calibration"]) | _told("finetune", config["finetune"])
    head |= _told("eval", config["eval"])
    head |= {"seed": _word(config["seed"]), "commit": commit(), REQUEST: _request(config)}
    head |= {f"versions/{name}": version for name, version in versions().items()}
    return head | {"sweep": job.sweep, "job": job.name}


def _method(job: Description) -> dict[str, Any]:
    """The settings of a method and of the groups that belong to it."""
    groups = _groups_of_method(job)
    told: dict[str, Any] = {}
    if "metric" in groups:
        told |= {"metric": job.choices["metric"]} | _told("metric", job.config["metric"])
    if "ratio" in groups:
        budget = _told("ratio", job.config["ratio"])
        share = budget.pop("ratio/ratio", None)
        told |= {"ratio": None if "ratio/target_gib" in budget else share}
        told |= {"ratio_method": job.choices["ratio"]} | budget
    method = job.choices["method"]
    return told | _told(method, job.config["method"])


def _groups_of_method(job: Description) -> tuple[str, ...]:
    """The config groups that belong to a job's method."""
    options = job.config["method"]
    target = _target(options)
    return target.groups(options) if _is_plugin(target) else ()


def _told(group: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the code behind a node says of its options, as <group>/<option> or as named there."""
    target = _target(options)
    settings = target.settings(options) if _is_plugin(target) else plain_options(options)
    return {
        key if "/" in key else f"{group}/{key}": _word(value) for key, value in settings.items()
    }


def _is_plugin(target: Any) -> TypeGuard[type[Plugin]]:
    return isinstance(target, type) and issubclass(target, Plugin)


def _target(options: Mapping[str, Any]) -> Any:
    """What a node's `_target_` names; None where there is none, which the job will refuse."""
    try:
        return target_of(options["_target_"]) if "_target_" in options else None
    except (UserError, ErrorDuringImport):
        return None


def _request(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits over all that was asked for; also over what will be refused."""
    asked = {key: value for key, value in config.items() if key not in NOT_ASKED}
    model = config["model"].items()
    asked["model"] = {key: value for key, value in model if key not in SAID_OF_MODELS}
    plain = json.loads(json.dumps(asked, default=str))  # keys that are numbers become text
    return stable_hash(json.dumps(plain, sort_keys=True))[:12]


def planned_layers(folder: Path) -> dict[str, str]:
    """The layers that the run's plan edits, in order of choice where it has one."""
    if not (folder / PLAN).is_file():
        return {}
    plan = Plan.load(folder / PLAN)
    edited = [chain.index for chain in plan.chains() if chain.changes]
    return {"plan/layers": json.dumps(plan.layer_order or edited)}


def _word(value: object) -> object:
    return value if isinstance(value, (str, int, float, type(None))) else json.dumps(value)
