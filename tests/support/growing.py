"""Many jobs in one process, and what that process holds after each."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats


def many(options: list[str], jobs: int, folder: Path) -> list[dict[str, float]]:
    """What a new process holds after each of so many jobs, each with other experts."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_work, args=(options, jobs, folder))
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()[-5000:]
    return [json.loads(line) for line in (folder / "held.jsonl").read_text().splitlines()]


def slope(values: list[float]) -> tuple[float, float]:
    """Growth a job by Theil and Sen's estimate, and its lower bound at 95 %.

    A step that is made once, such as a cache that fills, does not move it.
    """
    found = stats.theilslopes(np.array(values), alpha=0.95)
    return float(found.slope), float(found.low_slope)


def _work(options: list[str], jobs: int, folder: Path) -> None:
    output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir()
    os.chdir(folder)
    from fuzzed import told

    with (folder / "held.jsonl").open("w") as lines:
        for number in range(jobs):
            chosen = ["metric=random", f"seed={number}", f"store={folder / 'store'}"]
            assert told([*options, *chosen], folder / "run", whole=True).done
            lines.write(json.dumps(_held(folder / "tmp")) + "\n")
            lines.flush()
            for kind in ("plan", "compress"):
                shutil.rmtree(folder / "store" / kind)
    sys.exit(0)


def _held(temporary: Path) -> dict[str, Any]:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory in MiB": int(status["VmRSS"].split()[0]) / 1024,
        "open handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count() + int(status["Threads"]),
        "temporary files": sum(1 for _ in temporary.rglob("*")),
    }
