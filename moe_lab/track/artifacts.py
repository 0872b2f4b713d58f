"""What a run used and made, as a chain for its tracker: model -> profile -> plan -> checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_lab.files import CHECKPOINT, CURVE, FORM, MODEL_CARD, PLAN
from moe_lab.store import DONE
from moe_lab.track.tracker import TrackedArtifact

# Of each stage's result: its type, and the small files that are copied.
LINKS = {
    "profile": ("profile", (DONE,)),
    "plan": ("plan", (DONE, PLAN)),
    "compress": (
        "checkpoint",
        (DONE, FORM, f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/{MODEL_CARD}"),
    ),
    "finetune": (
        "checkpoint",
        (DONE, FORM, f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/{MODEL_CARD}", CURVE),
    ),
}
MADE_FROM = {"profile": ("model",), "plan": ("model", "profile"), "compress": ("model", "plan"),
             "finetune": ("model", "plan", "compress")}  # fmt: skip


def tracked_artifacts(report: Mapping[str, Any], store: Path) -> list[TrackedArtifact]:
    """The chain of a run by its report, as far as it came."""
    if "fingerprint/model" not in report:
        return []
    names = {"model": f"model-{report['fingerprint/model']}"}
    model = {"model": report["model"], "fingerprint": report["fingerprint/model"]}
    place = report.get("dense/checkpoint")
    chain = [
        TrackedArtifact(
            names["model"], "model", metadata=model, place=place and Path(place), found=True
        )
    ]
    for stage, (kind, files) in LINKS.items():
        made = report.get(f"artifact/{stage}")
        if made is None:
            continue
        folder = store / made
        names[stage] = made.replace("/", "-")
        there = [folder / name for name in files if (folder / name).is_file()]
        chain.append(
            TrackedArtifact(
                names[stage],
                kind,
                files=tuple(there),
                place=folder,
                metadata={"stage": stage, "seconds": report[f"seconds/{stage}"]},
                made_from=tuple(names[name] for name in MADE_FROM[stage] if name in names),
                found=bool(report[f"cached/{stage}"]),
            )
        )
    return chain
