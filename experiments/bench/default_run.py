"""Wall time and peak memory of `python run.py` from nothing, and of the same run again.

Peak memory is the largest sum over the run's processes of what each holds in RAM (resident set
sizes, looked at five times a second). Everything is written to a temporary folder. Arguments are
handed on to run.py, to look at another run against the same limits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_SECONDS, SECOND_SECONDS, PEAK_GIB = 360.0, 30.0, 4.0
ROOT = Path(__file__).resolve().parents[2]
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(root_pid: int) -> int:
    """Memory in RAM of a process and its descendants (Linux)."""
    parents, resident = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            resident[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * PAGE
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        parents[int(folder.name)] = int(stat[1])
    family, grown = {root_pid}, True
    while grown:
        grown = False
        for pid, parent in parents.items():
            if parent in family and pid not in family:
                family.add(pid)
                grown = True
    return sum(resident.get(pid, 0) for pid in family)


def run_once(outputs: Path, name: str) -> tuple[float, float]:
    """(wall seconds, peak GiB) of one default run; its log follows where it fails."""
    folders = [f"store={outputs / 'store'}", f"run_dir={outputs / name}"]
    command = [sys.executable, "run.py", *folders, *sys.argv[1:]]
    log = outputs / f"{name}.log"
    with log.open("w") as stream:
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
    return seconds, peak / 2**30


def main() -> int:
    """Run twice; 1 where a figure is over its limit."""
    with tempfile.TemporaryDirectory() as folder:
        first, peak = run_once(Path(folder), "first")
        second, _ = run_once(Path(folder), "second")
    figures = [
        ("default run, wall time", first, FIRST_SECONDS, "s"),
        ("default run, peak memory", peak, PEAK_GIB, "GiB"),
        ("the same run again, wall time", second, SECOND_SECONDS, "s"),
    ]
    for name, value, limit, unit in figures:
        verdict = "PASS" if value <= limit else "FAIL"
        print(f"{name}: {value:.1f} {unit}, limit {limit:.0f} {unit}: {verdict}")
    return int(any(value > limit for _, value, limit, _ in figures))


if __name__ == "__main__":
    sys.exit(main())
