"""Folders as runs leave them, made without running anything."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lab.report.report import write_report
from moe_lab.store import Artifact, Store

HOUR_AGO = -3600.0
REAP = "metric=reap,frequency"


def age(path: Path, seconds: float) -> None:
    """Shift a file's time."""
    time = path.stat().st_mtime + seconds
    os.utime(path, (time, time))


def start(folder: Path, overrides: list[str], cwd: Path, path: str = "shipped:tiny") -> None:
    """What Hydra leaves as a job starts; an hour ago."""
    hydra = folder / ".hydra"
    hydra.mkdir(parents=True)
    config = f"model:\n  path: {path}\nstore: outputs/store\nrun_dir: a/${{now:%Y}}\n"
    (hydra / "config.yaml").write_text(config)
    (hydra / "overrides.yaml").write_text("".join(f"- {one}\n" for one in overrides) or "[]\n")
    (hydra / "hydra.yaml").write_text(f"hydra:\n  runtime:\n    cwd: {cwd}\n")
    age(hydra / "config.yaml", HOUR_AGO)


def tell(folder: Path, status: str, *used: Artifact | tuple[str, Artifact], **more: Any) -> None:
    """A report of a job that used these results; a stage is named by its kind or as given."""
    said: dict[str, Any] = {"status": status, "error": None, "model": "tiny"}
    for one in used:
        stage, made = one if isinstance(one, tuple) else (one.kind, one)
        said |= {f"seconds/{stage}": made.seconds, f"cached/{stage}": made.cached,
                 f"artifact/{stage}": f"{made.kind}/{made.key}"}  # fmt: skip
    write_report(folder, said | {key.replace("__", "/"): value for key, value in more.items()})


def write_sweep(folder: Path, overrides: list[list[str]] | None, **more: Any) -> None:
    said = {"argv": ["-m", REAP], "cwd": str(folder.parent), "script": sys.executable,
            "python": sys.executable, "overrides": overrides, "started_at": "2026"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(said | more))


def result(store: Store, kind: str, size: int = 100, recent: bool = False, **identity: Any) -> Any:
    """A finished result of about that size, an hour old."""

    def make(folder: Path) -> None:
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "weights").write_bytes(b"x" * size)

    made = store.get(kind, {"kind": kind, "code": "c0dec0dec0de"} | identity, make)
    if not recent:
        age(made.folder / "artifact.json", HOUR_AGO)
    return made


def unfinished(store: Store, kind: str) -> Path:
    """What a killed job leaves of a result."""

    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get(kind, {"half": kind}, make)
    return next(path.parent for path in (store.root / kind).glob("*/half"))


class Stored:
    """A store and two jobs that use most of it; a third did not get far."""

    def __init__(self, place: Path) -> None:
        self.store = store = Store(place / "outputs" / "store")
        self.runs = place / "outputs" / "runs" / "a"
        self.profile = result(store, "profile", model="0123456789ab")
        self.plan = result(store, "plan", profile=self.profile.key)
        self.compress = result(store, "compress", size=5000, plan=self.plan.key)
        self.teacher = result(store, "teacher", model="0123456789ab")
        self.finetune = result(store, "finetune", size=7000, plan=self.plan.key,
                               checkpoint=self.compress.key, teacher=self.teacher.key)  # fmt: skip
        self.evaluate = result(store, "evaluate", checkpoint=self.finetune.key)
        self.search = result(store, "search", profile=self.profile.key, question="experts")
        self.old_profile = result(store, "profile", model="ba9876543210")
        self.old_search = result(store, "search", profile=self.old_profile.key)
        self.old_compress = result(store, "compress", size=3000, plan="aaaaaaaaaaaa")
        self.half = unfinished(store, "evaluate")
        for number, used in enumerate([(self.evaluate,), (self.compress,)]):
            start(self.runs / str(number), [], place)
            tell(self.runs / str(number), "ok", *used)

    def done(self) -> set[str]:
        """The finished results, as <kind>/<key>."""
        found = self.store.root.glob("*/*/artifact.json")
        return {path.parent.relative_to(self.store.root).as_posix() for path in found}

    def name(self, *made: Artifact) -> set[str]:
        return {f"{one.kind}/{one.key}" for one in made}


Command = Callable[..., tuple[int, str, str]]


class Process:
    """In the place of subprocess.Popen: what was asked for, and a code for each."""

    asked: list[tuple[tuple[str, ...], Path]]
    codes: list[int]

    def __init__(self, words: tuple[str, ...], cwd: Path) -> None:
        self.asked.append((words, cwd))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        return self.codes.pop(0)
