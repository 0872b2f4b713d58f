"""How long `python run.py --help` takes to answer: wall and CPU seconds of a fresh process.

Judged is the CPU's time, which other work on the machine does not change as much.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT_SECONDS, ROUNDS = 1.5, 3
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Time it a few times and judge the median; 1 where that is over the limit."""
    wall, cpu = [], []
    for _ in range(ROUNDS):
        started, before = time.perf_counter(), os.times()
        subprocess.run(
            [sys.executable, "run.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        wall.append(time.perf_counter() - started)
        used = os.times()
        cpu.append(
            used.children_user
            + used.children_system
            - before.children_user
            - before.children_system
        )
    seconds = statistics.median(cpu)
    passed = seconds <= LIMIT_SECONDS
    print(
        f"run.py --help: {seconds:.2f} CPU s, {statistics.median(wall):.2f} s in all (medians of "
        f"{ROUNDS}), limit {LIMIT_SECONDS} CPU s: {'PASS' if passed else 'FAIL'}"
    )
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
