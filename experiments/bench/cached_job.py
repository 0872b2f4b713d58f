"""What a job costs whose results are all in the store, in seconds of the CPU (user and system).

A further such job of a sweep, as the difference of sweeps of eight and of four; a second sweep of
eight jobs, in the folder of the first and in another one; and `python run.py --help`.

`python experiments/bench/cached_job.py` takes some three minutes, most of them for the first sweep.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FURTHER_JOB, SECOND_SWEEP, HELP = 0.5, 12.0, 1.5  # targets
ROUNDS = 3
METRICS = ("reap", "frequency", "ean", "gate_sum")
OPTIONS = (
    "method=prune", "finetune=none", "ratio.ratio=0.25,0.5", "eval.num_items=24",
    "eval.held_out.num_samples=24", "measure=none", "track=off", "compute.threads=1",
)  # fmt: skip


def seconds_of(words: Sequence[str]) -> float:
    """Seconds of the CPU that a run.py takes, with all that it starts."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "run.py", *words]
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise subprocess.CalledProcessError(started.returncode, command)
    return used.ru_utime + used.ru_stime


def sweep(store: Path, folder: Path, metrics: Sequence[str] = METRICS) -> list[str]:
    """The words of a sweep with two jobs for each metric."""
    asked = [f"metric={','.join(metrics)}", f"store={store}", f"hydra.sweep.dir={folder}"]
    return ["-m", *OPTIONS, *asked]


def told(what: str, seconds: float, target: float) -> bool:
    """Print a figure beside its target; whether it is within."""
    passed = seconds <= target
    print(
        f"{what}: {seconds:.2f} CPU s, target {target:g}: {'PASS' if passed else 'FAIL'}",
        flush=True,
    )
    return passed


def main() -> int:
    """Measure all, and judge the medians; 1 where one is over its target."""
    with tempfile.TemporaryDirectory() as home:
        store, first, half = (Path(home) / name for name in ("store", "first", "half"))
        filled = seconds_of(sweep(store, first))
        print(f"a first sweep of {2 * len(METRICS)} jobs: {filled:.2f} CPU s", flush=True)
        seconds_of(sweep(store, half, METRICS[:2]))
        same, other, four, answered = [], [], [], []
        for number in range(ROUNDS):
            same.append(seconds_of(sweep(store, first)))
            other.append(seconds_of(sweep(store, Path(home) / f"other{number}")))
            four.append(seconds_of(sweep(store, half, METRICS[:2])))
            answered.append(seconds_of(["--help"]))
    further = [(a - b) / 4 for a, b in zip(same, four, strict=True)]
    passed = [
        told("a further cached job of a sweep", statistics.median(further), FURTHER_JOB),
        told("a second sweep of 8 jobs", statistics.median(same), SECOND_SWEEP),
        told("the same in another folder", statistics.median(other), SECOND_SWEEP),
        told("run.py --help", statistics.median(answered), HELP),
    ]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
