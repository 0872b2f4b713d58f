"""Golden figures: what whole runs gave once, so that nothing that is made faster gives another.

`python tests/support/golden.py` writes tests/golden/figures.json anew, from runs of its own: only
where a figure is meant to change, with the reason in the commit.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from running import OFFLINE, ROOT, run_command

FIGURES = ROOT / "tests" / "golden" / "figures.json"
# Everything that a sweep may have, at a size that a test can afford; the default run is whole.
SMALL = ["eval.num_items=24", "eval.held_out.num_samples=24", "measure=none", "track=off"]
COMMANDS = {
    "default": ["track=off"],
    "experts": [
        "-m", "model=tiny_mixtral", "method=prune", "metric=reap,soft_count",
        "ratio.ratio=0.25,0.5", "finetune=none", *SMALL,
    ],
    "half precision": [
        "-m", "model.dtype=bfloat16", "condense.num_layers=2", "condense.experts=greedy_js",
        "condense.layers=greedy_js,one_shot_global", "calibration.num_samples=16",
        "finetune=none", *SMALL,
    ],
    "fewer active": [
        "-m", "model=tiny_qwen2_moe", "method=prune,merge", "finetune=seer",
        "finetune.phases.lm.data.num_samples=128", "finetune.phases.lm.validation.num_samples=16",
        "finetune.validate_every=4", *SMALL,
    ],
}  # fmt: skip
# Clocks, memory as it was measured, places, and who ran it.
LEFT_OUT = ("seconds", "speedup", "memory", "checkpoint", "commit", "versions", "hardware", "job")
LEFT_OUT += ("run_id", "sweep", "cached", "artifact", "serving", "url", "fingerprint/request")


def run(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Run one of COMMANDS in a folder: the figures of each job, by the job's number."""
    words = COMMANDS[name]
    place = f"hydra.sweep.dir={folder / name}" if "-m" in words else f"run_dir={folder / name}/0"
    done = run_command(folder, *words, place, f"store={folder / 'store'}", "compute.threads=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = sorted((folder / name).glob("*/report.json"))
    return {path.parent.name: _figures(json.loads(path.read_text())) for path in reports}


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in report.items()
        if not any(word in key for word in LEFT_OUT)
        and (key.startswith("fingerprint/") or not isinstance(value, (str, type(None))))
    }


def main() -> None:
    """Write all figures, as they are now."""
    os.environ.update(OFFLINE)
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: run(name, Path(folder)) for name in COMMANDS}
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
