"""The stages of a run; each says what its result depends on and makes its folder.

Here is what the pipeline needs between them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_lab.checkpoint import Checkpoint
from moe_lab.data import Tokens
from moe_lab.store import Artifact
from moe_lab.types import Plan


def tokenize(parts: dict[str, Any], tokenizer: Any) -> dict[str, Tokens]:
    """All text of a run: calibration, and where they are asked for data, validation, held_out."""
    sources = {"calibration": parts["calibration"]}
    if parts["finetune"]:
        sources |= {"data": parts["finetune"].data, "validation": parts["finetune"].validation}
    if parts["eval"] and parts["eval"].held_out:
        sources["held_out"] = parts["eval"].held_out
    if parts["eval"]:
        parts["eval"].check()
    return {name: source.tokens(tokenizer) for name, source in sources.items()}


def publish_plan(planned: Artifact, folder: Path) -> bool:
    """Put plan.json into the run's folder; True where the plan changes anything."""
    text = (planned.folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text)
    return bool(Plan.load(folder / "plan.json").edited())


def checkpoint_of(artifact: Artifact, dense: Checkpoint) -> Checkpoint:
    """The checkpoint of a finished compress or finetune stage, known by the stage's key."""
    return Checkpoint(artifact.folder / "checkpoint", dense.dtype, artifact.key)


class Recorder:
    """Writes what the stages found into a run's report."""

    def __init__(self, report: dict[str, Any]):
        self.report = report

    def __call__(self, stage: str, artifact: Artifact) -> Artifact:
        """Note the seconds a stage took (when it was made) and whether it was there already."""
        self.report[f"seconds/{stage}"] = round(artifact.seconds, 3)
        self.report[f"cached/{stage}"] = artifact.cached
        return artifact

    def checkpoints(self, variants: dict[str, Checkpoint]) -> None:
        """Where each variant lies, and whether stock transformers loads it."""
        for name, checkpoint in variants.items():
            form = checkpoint.path.parent / "form.json"
            stock = json.loads(form.read_text())["stock"] if form.is_file() else True
            self.report[f"{name}/checkpoint"] = str(checkpoint.path)
            self.report[f"{name}/stock"] = stock

    def evaluation(self, name: str, results: dict[str, float]) -> None:
        """The scores of one variant."""
        for key, value in results.items():
            self.report[f"{name}/kl" if key == "kl" else f"{name}/eval/{key}"] = value
