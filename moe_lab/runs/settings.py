"""What a job is and was asked for, as its report says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc import ErrorDuringImport
from typing import Any

from moe_lab.files import PLAN
from moe_lab.models.edits.plan import Plan
from moe_lab.option import Plugin
from moe_lab.report.frame import REQUEST, RESULT_KEYS
from moe_lab.runs.options import target_of
from moe_lab.store import commit
from moe_lab.track.tracker import stable_hash
from moe_lab.types import UserError

RECIPE_OPTIONS = (
    "top_k", "entropy", "annealing", "annealed_at", "trains", "windows", "beta", "force",
    "distillation", "temperature", "teacher_top_k",
)  # fmt: skip
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


def tags_of(job: Description) -> list[str]:
    """Model, method, criterion and recipe."""
    groups = ["model", "method", *(["metric"] if job.choices["method"] == "prune" else []),
              "finetune"]  # fmt: skip
    return [job.choices[group] for group in groups if job.choices[group] != "none"]


def settings_of_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report's settings, by the names that tables give them."""
    return {key: value for key, value in report.items() if not RESULT_KEYS.match(key)}


def report_head(job: Description) -> dict[str, Any]:
    """What a report says before its job begins: the settings and where it comes from."""
    method, config = job.choices["method"], job.config
    head: dict[str, Any] = {"status": "running", "error": None}
    head |= {"model": config["model"]["name"], "method": method, "metric": None, "ratio": None}
    own = _own_options(method, config["method"])
    if method == "prune":
        head |= {"metric": job.choices["metric"]} | _options("metric", config["metric"])
    if method == "prune" or (method == "merge" and f"{method}/num_experts" not in own):
        budget = _options("ratio", config["ratio"])
        share = budget.pop("ratio/ratio", None)
        head |= {"ratio": None if "ratio/target_gib" in budget else share}
        head |= {"ratio_method": job.choices["ratio"]} | budget
    head |= own
    head |= {key: job.choices[key] for key in ("calibration", "finetune", "eval")}
    head |= _options("calibration", config["calibration"])
    head |= {f"finetune/{key}": _word(config["finetune"][key]) for key in RECIPE_OPTIONS
              if key in config["finetune"]}  # fmt: skip
    head |= {"seed": config["seed"], "commit": commit(), REQUEST: _request(config)}
    return head | {"sweep": job.sweep, "job": job.name}


def _request(config: Mapping[str, Any]) -> str:
    """12 hexadecimal digits over all that was asked for; also over what will be refused."""
    asked = {key: value for key, value in config.items() if key not in NOT_ASKED}
    plain = json.loads(json.dumps(asked, default=str))  # keys that are numbers become text
    return stable_hash(json.dumps(plain, sort_keys=True))[:12]


def _own_options(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """What the class behind a group says of its options; of one that is refused, all of them."""
    try:
        told = target_of(node["_target_"]).settings(node)
    except (UserError, ErrorDuringImport):
        told = Plugin.settings(node)
    return {key if "/" in key else f"{name}/{key}": _word(value) for key, value in told.items()}


def _options(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The plain options of a group as <name>/<option>, as far as they are given."""
    return {
        f"{name}/{key}": _word(value)
        for key, value in node.items()
        if not key.startswith("_") and value is not None and not isinstance(value, Mapping)
    }


def planned_layers(folder: Path) -> dict[str, str]:
    """The layers that the run's plan edits, in order of choice where it has one."""
    if not (folder / PLAN).is_file():
        return {}
    plan = Plan.load(folder / PLAN)
    edited = [chain.index for chain in plan.chains() if chain.changes]
    return {"plan/layers": json.dumps(plan.layer_order or edited)}


def _word(value: object) -> object:
    return value if isinstance(value, (str, int, float, type(None))) else json.dumps(value)
