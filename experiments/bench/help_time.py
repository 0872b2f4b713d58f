"""How long `python run.py --help` takes to answer: the wall time of a fresh process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT_SECONDS, ROUNDS = 3.0, 3
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Time it a few times and judge the median; 1 where that is over the limit."""
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "run.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    passed = seconds <= LIMIT_SECONDS
    print(
        f"run.py --help: {seconds:.2f} s (median of {ROUNDS}), limit {LIMIT_SECONDS} s: "
        f"{'PASS' if passed else 'FAIL'}"
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
