"""The launchers' commands of docs/sweeps.md, run; jobs that are stopped and go on."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fake_slurm
import fault_jobs
import pytest
from running import QUICK, ROOT

from moe_lab.files import CURVE, LOCK
from moe_lab.locks import held, holder_of
from moe_lab.report.report import read_report
from moe_lab.runs.status import find_jobs

LM = "finetune.phases.lm"
PAGE = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
BASH = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def documented(launcher: str) -> list[str]:
    """The words of the page's command behind `python run.py`."""
    lines = re.sub(r"\\\n\s*", "", BASH).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    (words,) = [one for one in commands if f"hydra/launcher={launcher}" in one and "-m" in one]
    return words[2:]


def tuned(texts: Path, steps: int) -> list[str]:
    data = [
        word
        for node, samples in ((f"{LM}.data", 8), (f"{LM}.validation", 4))
        for word in (f"calibration@{node}=files", f"{node}.files=[{texts}]",
                     f"{node}.num_samples={samples}")
    ]  # fmt: skip
    return ["finetune=experts", *data, f"{LM}.batch_size=2", f"+{LM}.num_steps={steps}"]


Started = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def sweep(small: list[str], tmp_path: Path) -> Started:
    """A documented command, made small, with its folders in tmp_path: sweep/ and store/."""

    def start(launcher: str, *others: str, **environment: str) -> subprocess.Popen[str]:
        own = [*others, f"hydra.sweep.dir={tmp_path / 'sweep'}", f"store={tmp_path / 'store'}"]
        words: dict[str, str] = {}
        for word in ["-m", *small, *QUICK, *documented(launcher), *own]:
            words[word.partition("=")[0]] = word  # the last one of a key counts
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *words.values()], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean | environment,
        )  # fmt: skip

    return start


def ended(process: subprocess.Popen[str]) -> str:
    """What it printed; AssertionError where it does not end well."""
    try:
        text, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, text
    return text


def check_sweep(folder: Path, text: str, jobs: int) -> None:
    """Its end is that of any sweep."""
    assert f"{jobs} jobs: {jobs} ok" in text
    assert {"table.md", "index.html"} <= {path.name for path in folder.iterdir()}
    assert [job.status for job in find_jobs(folder)] == ["ok"] * jobs


def check_made_once(folders: list[Path]) -> None:
    """Each result was made by one of the jobs."""
    reports = [read_report(folder) for folder in folders]
    made = Counter(
        report[f"artifact/{stage}"]
        for report in reports
        for stage in ("profile", "plan", "compress")
        if not report[f"cached/{stage}"]
    )
    assert set(made) == {
        report[f"artifact/{stage}"]
        for report in reports
        for stage in ("profile", "plan", "compress")
    }
    assert max(made.values()) == 1
    assert len({report["artifact/profile"] for report in reports}) == 1


def wait_until(there: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not there():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)


def warn(job: Path) -> None:
    """What submitit's warning is to a running job."""
    holder = holder_of(job / LOCK)
    assert holder and holder.here
    os.kill(holder.pid, signal.SIGUSR2)


def test_joblib(sweep: Started, tmp_path: Path) -> None:
    check_sweep(tmp_path / "sweep", ended(sweep("lab_joblib")), 2)
    check_made_once([tmp_path / "sweep" / number for number in "01"])


def test_ray(sweep: Started, tmp_path: Path) -> None:
    check_sweep(tmp_path / "sweep", ended(sweep("lab_ray")), 2)


def test_a_job_of_submitit_goes_on_to_the_same_bytes(
    sweep: Started, small: list[str], text_file: Path, tmp_path: Path
) -> None:
    """Warned in the middle of its training, as before its time limit."""
    options = ["metric=reap", *tuned(text_file, 60)]
    process = sweep("lab_submitit_local", *options)
    curves = functools.partial((tmp_path / "store").glob, f"finetune/*/{CURVE}")
    wait_until(lambda: any(len(one.read_text().splitlines()) > 5 for one in curves()), process)
    warn(tmp_path / "sweep" / "0")
    check_sweep(tmp_path / "sweep", ended(process), 1)
    (log,) = (tmp_path / "sweep" / ".submitit").glob("*/*_log.out")
    told = log.read_text()
    assert told.count("Requeued job") == 1 and told.count("stopped by SIGUSR2") == 1

    rest = [option for option in QUICK if not option.startswith("finetune")]
    plain = fault_jobs.run(tmp_path / "plain", [*small, *rest, *options, "store=s", "run_dir=r"])
    assert plain.process.exitcode == 0, plain.text()
    stores = tmp_path / "store", tmp_path / "plain" / "s"
    after, before = map(fault_jobs.contents, stores)
    assert before and {k for k in before | after if before.get(k) != after.get(k)} == set()
    reports = read_report(tmp_path / "plain" / "r"), read_report(tmp_path / "sweep" / "0")
    assert fault_jobs.differences(*reports) == []


def test_slurm(sweep: Started, tmp_path: Path) -> None:
    """What sbatch is given; a task that is warned is queued again, and ends well."""
    process = sweep("lab_submitit_slurm", **fake_slurm.install(tmp_path / "slurm"))
    job = tmp_path / "sweep" / "0"
    wait_until(lambda: held(job / LOCK) and holder_of(job / LOCK), process)
    warn(job)
    check_sweep(tmp_path / "sweep", ended(process), 2)
    assert (tmp_path / "slurm" / "requeued").read_text() == "77_0\n"
    script = (tmp_path / "slurm" / "script.sh").read_text()
    flags = set(re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE))
    assert {"array=0-1%2", "signal=USR2@300", "requeue", "time=240", "mem=64GB", "partition=gpu",
            "cpus-per-task=8", "gpus-per-node=1", "open-mode=append"} <= flags  # fmt: skip


def test_four_jobs_at_once_make_each_result_once(small: list[str], tmp_path: Path) -> None:
    metrics = ("reap", "ean", "frequency", "soft_count")
    store = f"store={tmp_path / 'store'}"
    jobs = [
        fault_jobs.Job(tmp_path / name, [*small, *QUICK, f"metric={name}", store, "run_dir=run"])
        for name in metrics
    ]
    for one in jobs:
        assert one.wait() == 0, one.text()
    check_made_once([tmp_path / name / "run" for name in metrics])
