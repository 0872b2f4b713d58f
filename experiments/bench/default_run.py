"""Wall time, CPU time and peak memory of `python run.py` from nothing, and of the same run again.

Peak memory is the largest sum over the run's processes of what each holds in RAM (resident set
sizes, looked at five times a second). Everything is written to a temporary folder. Arguments are
handed on to run.py, to look at another run against the same limits.

`--before <checkout or revision>`: the run of another checkout too, by turns with this one's, and
the share of its CPU seconds that this one takes. The limit is meant for a8f50ea, whose runs took
197 to 204 of them (two cores of a Xeon without units for bfloat16). Both want
`track=off compute.threads=1`, and a machine that does nothing else: beside other work CPU seconds
grow too, by as much as they differ.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_SECONDS, SECOND_SECONDS, PEAK_GIB = 360.0, 30.0, 4.0
ROUNDS, SHARE = 2, 0.5  # runs of each checkout, and of the CPU seconds before
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


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_once(
    outputs: Path, name: str, options: list[str], root: Path = ROOT
) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak GiB) of one run; its log follows where it fails."""
    folders = [f"store={outputs / 'store'}", f"run_dir={outputs / name}"]
    command = [sys.executable, "run.py", *folders, *options]
    before = cpu_seconds()
    log = outputs / f"{name}.log"
    with log.open("w") as stream:
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(
            command, cwd=root, stdout=stream, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
    return seconds, cpu_seconds() - before, peak / 2**30


def beside(before: Path, options: list[str]) -> int:
    """Both checkouts by turns; 1 where this one takes too much of the other's CPU seconds."""
    taken: dict[Path, list[float]] = {before: [], ROOT: []}
    for number in range(ROUNDS):
        for root, found in taken.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(run_once(Path(folder), "run", options, root)[1])
            print(f"round {number + 1}, {root}: {found[-1]:.1f} CPU s", flush=True)
    share = min(taken[ROOT]) / min(taken[before])
    verdict = "PASS" if share <= SHARE else "FAIL"
    print(f"default run, share of the CPU seconds before: {share:.2f}, limit {SHARE}: {verdict}")
    return int(share > SHARE)


def checkout(named: str, folder: Path) -> Path:
    """A checkout that is named, or the files of a revision of this one, put into the folder."""
    if Path(named).is_dir():
        return Path(named).resolve()
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        subprocess.run(["git", "archive", "-o", archive.name, named], cwd=ROOT, check=True)
        shutil.unpack_archive(archive.name, folder)
    return folder


def main() -> int:
    """Run twice; 1 where a figure is over its limit."""
    if sys.argv[1:2] == ["--before"]:
        with tempfile.TemporaryDirectory() as folder:
            return beside(checkout(sys.argv[2], Path(folder)), sys.argv[3:])
    options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        first, cpu, peak = run_once(Path(folder), "first", options)
        second, _, _ = run_once(Path(folder), "second", options)
    print(f"default run, CPU time: {cpu:.1f} s (limit {SHARE} of what a8f50ea takes on the same "
          "machine: --before a8f50ea)")  # fmt: skip
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
