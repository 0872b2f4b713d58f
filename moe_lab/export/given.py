"""What is exported: a checkpoint, the plan that made it, and the model that the plan edits.

Of what was not given, the folders that a run leaves behind say where it lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from moe_lab.files import CHECKPOINT, PLAN, REPORT
from moe_lab.models.checkpoint import Checkpoint, Original, resolve
from moe_lab.models.edits.plan import Plan, check_plan
from moe_lab.store import DONE, check_undamaged
from moe_lab.types import LayerInfo, UserError

# What was made behind the plan in a run, the last first, and the stage that wrote it.
WRITTEN_BY = {"quantized": "quantize", "finetuned": "finetune"}


@dataclass(frozen=True)
class Given:
    """What was given, and what is known of it; paths, None where they are not known.

    path: as asked for: a folder, a hub id, or a plan's file; plan_file: the plan; model: the dense
    model that the plan edits; made_by: the stage that wrote the checkpoint, where that is known.
    """

    path: str
    checkpoint_folder: Path | None = None
    plan_file: Path | None = None
    model: str | None = None
    made_by: str | None = None

    @property
    def name(self) -> str:
        """What a file made of it is called unless it is said."""
        path = Path(self.path.removeprefix("shipped:")).resolve()
        path = path.parent if path.name in (PLAN, CHECKPOINT) else path
        return path.stem if path.suffix == ".json" else path.name

    def checkpoint(self) -> Checkpoint:
        """The checkpoint; UserError where only a plan was given."""
        if self.checkpoint_folder is None:
            raise UserError(
                f"{self.path} is a plan, and this target is made from a checkpoint: give the "
                "folder of the weights (the run's report.json names it)"
            )
        found = resolve(self.checkpoint_folder)
        check_undamaged(found.path)
        if isinstance(found, Original):
            found.load()  # refused, with what converts it
        return found

    def plan(self) -> Plan:
        """The plan; UserError where none is found."""
        if self.plan_file is None:
            raise UserError(
                f"no plan of {self.path} is found. It is looked for in a run's folder "
                f"({PLAN} beside {REPORT}), and for a checkpoint of the store in "
                f"<store>/plan/<key>/{PLAN}; give its file with --plan"
            )
        try:
            return Plan.load(self.plan_file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.plan_file} is no plan that can be read: {error!r}") from error

    def dense(self) -> Checkpoint:
        """The model that the plan edits; UserError where none is found."""
        if self.model is None:
            raise UserError(
                f"which model the plan of {self.path} edits is not known: {REPORT} beside the "
                "plan would name it; give its folder or hub id with --model"
            )
        return resolve(self.model)


def find_given(path: str, plan: str | None = None, model: str | None = None) -> Given:
    """What `path` is: a plan's file, a run's folder, or a checkpoint (folder, hub id, shipped:).

    plan, model: the plan's file and the dense model, where they are given. Raises UserError for a
    path where nothing lies.
    """
    place, checkpoint, made_by = Path(path).expanduser(), None, None
    plan_file = Path(plan).expanduser() if plan else None
    if plan_file and not plan_file.is_file():
        raise UserError(f"--plan {plan}: there is no such file")
    if place.is_file():
        plan_file, run = plan_file or place, place.parent
    elif (place / REPORT).is_file():
        run = place
        made = {name: _told(run, f"{name}/checkpoint") for name in (*WRITTEN_BY, "compressed")}
        last = next((name for name, folder in made.items() if folder), "")
        made_by, checkpoint = WRITTEN_BY.get(last), made.get(last)
        plan_file = plan_file or _if_file(run / PLAN)
    else:
        checkpoint = str(resolve(path).path)
        made_by, found = _in_store(Path(checkpoint))
        plan_file = plan_file or found
        run = plan_file.parent if plan_file else place
    return Given(
        path,
        Path(checkpoint) if checkpoint else None,
        plan_file,
        model or _told(run, "dense/checkpoint"),
        made_by,
    )


def _in_store(checkpoint: Path) -> tuple[str | None, Path | None]:
    """Of a checkpoint in the store, the kind of its result, and the plan that it carries out."""
    record = _read(checkpoint.parent / DONE)
    if not record or checkpoint.name != CHECKPOINT:
        return None, None
    key = record["identity"].get("plan")
    root = checkpoint.parents[2]
    return record["kind"], _if_file(root / "plan" / key / PLAN) if key else None


def _told(run: Path, key: str) -> str | None:
    return _read(run / REPORT).get(key)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def pruned_by(given: Given, target: str) -> dict[LayerInfo, tuple[int, ...]]:
    """For each MoE layer of the dense model the experts that a plan of plain prunes keeps.

    Raises UserError for any other plan, with what the target can say.
    """
    if given.made_by not in (None, "compress"):
        raise UserError(
            f"--to {target} says which experts of the dense model go, and {given.path} was "
            f"changed further ({given.made_by}): serve the checkpoint itself, or give plan.json "
            "for what it was before"
        )
    plan = given.plan()
    for chain in plan.chains():
        kinds = [edit.title for edit in chain.edits if edit.changes]
        if kinds and kinds != ["prune"]:
            raise UserError(
                f"--to {target} can say plain prunes alone, experts that go with their router rows "
                f"(method=prune method.replacement=nothing): layer {chain.index} has "
                f"{', then '.join(kinds)}"
            )
    dense = given.dense()
    layers = dense.layers()
    check_plan(layers, plan.edited())
    kept = {edit.index: edit.experts_kept for edit in plan.edited()}
    return {info: tuple(kept.get(info.index) or range(info.num_experts)) for info in layers}


@contextmanager
def written_whole(out: Path, overwrite: bool) -> Iterator[Path]:
    """While open, a path to write a file or a folder to, which is `out` at the end or not at all.

    Raises UserError where there is one, unless it may be overwritten.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: name another place with --out, or say --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.partial_", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        yield partial
        if out.is_dir():
            rmtree(out)
        partial.replace(out)
