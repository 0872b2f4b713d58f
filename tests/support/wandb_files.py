"""A job to track, and what W&B's own reader, `wandb leet inspect`, finds in its offline files."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from moe_lab.track.tracker import TrackedArtifact
from moe_lab.track.wandb import WandbTracker

CONFIG = {
    "seed": 7,
    "method": {"_target_": "moe_lab.methods.prune.Prune", "name": "prune", "layers": None},
    "ratio": {"ratio": 0.5},
    "finetune": {"phases": {"lm": {"learning_rate": 1e-4, "texts": ["a", "b"]}}},
}
ROWS = [
    {"phase": "lm", "step": 0},
    {"phase": "lm", "step": 1, "tokens": 10, "loss": 2.5, "validation_loss": None},
    {"phase": "lm", "step": 2, "tokens": 20, "loss": 1.25, "validation_loss": 1.5},
]
READER = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]


class Quiet(tempfile.TemporaryDirectory):
    """A folder that Python does not warn about: W&B leaves those of its tables to be collected."""

    @classmethod
    def _cleanup(cls, name: str, warn_message: str, ignore_errors: bool = False) -> None:
        shutil.rmtree(name, ignore_errors=True)


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No settings or keys of whoever runs the tests."""
    ours = types.SimpleNamespace(**vars(tempfile) | {"TemporaryDirectory": Quiet})
    monkeypatch.setattr("wandb.sdk.artifacts.artifact.tempfile", ours)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder / "config"))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))


def as_user_of(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key for the server there; W&B reads both when it is set up, so it must not be yet."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)


def items(folder: Path) -> list[TrackedArtifact]:
    """A job that found its profile, and made a plan and a checkpoint."""
    place = folder / "checkpoint"
    return [
        TrackedArtifact("model-ab12", "model", place="https://host/model",
                        metadata={"fingerprint": "ab12"}, found=True),
        TrackedArtifact("profile-cd34", "profile", (folder / "plan.json",),
                        made_from=("model-ab12",), found=True),
        TrackedArtifact("plan of job=1", "plan", (folder / "plan.json",),
                        made_from=("profile-cd34",)),
        TrackedArtifact("checkpoint-ef56", "checkpoint", (place / "config.json",), place=place,
                        made_from=("plan of job=1",)),
    ]  # fmt: skip


def prepare(folder: Path) -> None:
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text("{}")
    (folder / "index.html").write_text("<p>page</p>")
    (folder / "checkpoint" / "config.json").write_text('{"layers": 2}')
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    Image.new("RGB", (8, 4), "red").save(folder / "loss.png")


def use(tracker: WandbTracker, folder: Path, name: str = "job", **identity: str) -> None:
    prepare(folder)
    tracker.start(folder, CONFIG, "sweep", name, ["tiny", "prune", "tiny", ""], **identity)
    for row in [*ROWS, *ROWS]:  # live, and once more from the file
        tracker.log_curve(row)
    rows = [[1, "x", True], [2.5, None, 1], ["all", "z", math.nan]]
    tracker.table("result", ["a", "b", "c"], rows)
    tracker.images([folder / "loss.png"])
    tracker.html("page", folder / "index.html")
    tracker.artifacts(items(folder))
    tracker.summary({"status": "ok", "dense/eval/average": 0.75, "error": None})
    tracker.finish(0)


@dataclass
class Offline:
    """One finished run's folder and its records, each a dictionary with the record's type."""

    folder: Path
    records: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def run(self) -> dict[str, Any]:
        return self.of("run")[0]

    @property
    def config(self) -> dict[str, Any]:
        return {key: value for key, value in self.run["config"]["update"].items() if key[0] != "_"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """Each logged row, without W&B's own times."""
        times = ("_runtime", "_timestamp")
        return [{key: value for key, value in row["item"].items() if key not in times}
                for row in self.of("history")]  # fmt: skip

    @property
    def curve(self) -> list[dict[str, Any]]:
        return [row for row in self.history if "finetune/step" in row]

    @property
    def summary(self) -> dict[str, Any]:
        parts = [part.get("update", {}) for part in self.of("summary")]
        return {key: value for part in parts for key, value in part.items()}

    @property
    def artifacts(self) -> dict[str, dict[str, Any]]:
        """Without those that W&B makes of tables; metadata as a dictionary, contents by path."""
        found = {}
        for one in self.of("artifact"):
            contents = {entry["path"]: entry for entry in one["manifest"].get("contents", [])}
            metadata = json.loads(one.get("metadata", "{}"))
            found[one["name"]] = one | {"metadata": metadata, "contents": contents}
        return {name: one for name, one in found.items() if one["type"] != "run_table"}

    @property
    def exit_code(self) -> int:
        return self.of("exit")[0]["exit_code"]

    def media(self, key: str) -> Path:
        """The file of a table, a picture or a page."""
        (path,) = [row[f"{key}.path"] for row in self.history if f"{key}.path" in row]
        return self.folder / "files" / path


def read_back(folder: Path) -> list[Offline]:
    """The offline runs under a run's folder, the oldest first, each read until its exit."""
    found = []
    for path in folder.glob("wandb/offline-run-*/run-*.wandb"):
        # A file is complete a moment after finish.
        lines = _read(folder, "--follow", "--idle-timeout", "30s", str(path)).splitlines()
        found.append(Offline(path.parent, [json.loads(line) for line in lines]))
    return sorted(found, key=lambda one: one.run["start_time"])


def read_one(folder: Path) -> Offline:
    (found,) = read_back(folder)
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """What the reader tells of the latest run."""
    return json.loads(_read(folder, "--summary", str(folder / "wandb")))


def _read(folder: Path, *arguments: str) -> str:
    # From that folder, because W&B puts a log of its own where it is called.
    command = [*READER, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
