"""Several processes that share one run: what they exchange, how they end, and a whole run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, Outcome, start_two

from moe_lab import processes
from moe_lab.processes import Failure
from moe_lab.store import Store

TOGETHER = """
import sys
from pathlib import Path
import torch
from moe_lab import processes
from moe_lab.store import Store

torch.set_num_threads(1)
index = processes.index()
assert processes.gather({"from": index}) == [{"from": 0}, {"from": 1}]
assert processes.broadcast(["of", index]) == ["of", 0]
assert processes.share("abcde") == list("ace" if index == 0 else "bd")
assert processes.join([part.upper() for part in processes.share("abcde")]) == list("ABCDE")
assert processes.total(torch.tensor([1.0, index])).tolist() == [2.0, 1.0]
with processes.alone():
    assert (processes.number(), processes.gather(index)) == (1, [index])
store = Store(Path(sys.argv[1]))
found = []
for together in (False, True, True):
    make = lambda folder: (folder / f"{index} of {processes.number()}").write_text("")
    found.append(store.get("kind", {"together": together}, make, together))
assert processes.gather(found)[0] == found
assert [one.cached for one in found] == [False, False, True]

for mistake in ("before they have met", "while the other waits", "while the other cannot look"):
    try:
        if mistake != "before they have met":
            processes.wait()
        if index == 1:
            raise ValueError(mistake)
        if mistake == "while the other cannot look":
            torch.distributed.all_reduce(torch.ones(2))
        processes.wait()
    except Exception as error:
        ended = processes.failed(error, f"{error}", 2)
    assert (ended.process, ended.message) == (1, mistake), ended
    assert processes.end_job(7 if index == 0 else 2) == 7
processes.leave()
processes.close()
"""


def test_alone_all_is_as_if_there_were_no_others() -> None:
    tensor = torch.ones(2)
    assert (processes.number(), processes.index(), processes.is_main()) == (1, 0, True)
    assert processes.share([1, 2, 3]) == [1, 2, 3] == processes.join([1, 2, 3])
    assert processes.broadcast("x") == "x" and processes.gather("x") == ["x"]
    assert processes.total(tensor) is tensor
    processes.wait()
    processes.leave()
    assert processes.failed(ValueError("no"), "no", 2) == Failure(0, "no", 2)
    assert processes.failure() is None and processes.end_job(2) == 2


def test_two_exchange_make_results_together_and_fail_together(tmp_path: Path) -> None:
    started = start_two(TOGETHER, str(tmp_path))
    assert [one.wait(timeout=120) for one in started] == [0, 0]
    made = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("kind/*/* of *"))
    assert [Path(path).name for path in made if "of 1" in path] == ["0 of 1"]
    assert [Path(path).name for path in made if "of 2" in path] == ["0 of 2", "1 of 2"]
    assert Store(tmp_path).find("kind", {"together": True})


def start(*overrides: str, folder: Path) -> list[subprocess.Popen[str]]:
    """run.py twice, as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *overrides],
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]  # fmt: skip


def ends(started: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Each one's exit code, and what it printed."""
    told = [one.communicate(timeout=120)[0] for one in started]
    return list(zip((one.returncode for one in started), told, strict=True))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Two processes, which end with the test."""
    every: list[subprocess.Popen[str]] = []

    def begin(*overrides: str) -> list[subprocess.Popen[str]]:
        every.extend(start(*overrides, folder=tmp_path))
        return every

    yield begin
    for one in every:
        if one.poll() is None:
            one.kill()
        one.communicate()


def test_a_users_mistake_in_all_is_told_once(
    two: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    """In every job of a sweep, and the next one goes on with the same processes."""
    wrong = "method=prune ratio.ratio=0.25,0.99 finetune=none eval=none measure=none".split()
    (code, told), (other, silence) = ends(two("-m", *small, *wrong, "hydra.sweep.dir=sweep"))
    assert (code, other, silence) == (2, 2, ""), told
    assert told.count("ratio.ratio=0.99") and "Traceback" not in told
    statuses = [
        json.loads((tmp_path / "sweep" / job / "report.json").read_text())["status"]
        for job in ("0", "1")
    ]
    assert statuses == ["ok", "failed"]
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["overrides"]


def test_a_mistake_ends_both_with_its_code(two: Callable[..., Any], small: list[str]) -> None:
    (code, told), (other, silence) = ends(two(*small, "run_dir=run", "model.path=nowhere"))
    assert (code, other, silence) == (2, 2, "")
    assert told.count("nowhere") == 1 and "Traceback" not in told


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(
    killed: int, two: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    """By itself: torchrun would end it too."""
    many = "method=none finetune=seer finetune.phases.lm.data.num_samples=3000".split()
    started = two(*small, *many, "eval=none", "measure=none", "run_dir=run")
    until = time.monotonic() + 100
    while not (tmp_path / "outputs" / "store" / "finetune").exists():
        assert time.monotonic() < until and started[0].poll() is None
        time.sleep(0.1)
    started[killed].send_signal(signal.SIGKILL)
    code, told = ends(started)[1 - killed]
    assert code == 1
    assert killed == 0 or "has ended without a word" in told


FULL = [
    "method=condense",
    "finetune=experts",
    "finetune.distillation=0.5",
    "finetune.validate_every=2",
    "finetune.phases.lm.data.num_samples=20",
    "finetune.phases.lm.data.max_length=32",
    "finetune.phases.lm.validation.num_samples=5",
    "finetune.phases.lm.batch_size=8",
    "eval=tiny",
    "eval.num_items=3",
    "eval.held_out.num_samples=5",
    "condense.padding=1",
    "measure=speed",
    "measure.prompt_length=16",
    "measure.decode_tokens=2",
    "measure.repeats=1",
    "compute.batch_size=3",
]
NOT_COMPARED = ("seconds/", "cached/", "_speedup", "_per_second", "peak_", "memory_ratio")


def test_accelerate_takes_a_whole_run_through_two_processes(
    job: Callable[..., Outcome], small: list[str], tmp_path: Path
) -> None:
    """With the figures of one: to 1e-6 before the tuning, whose losses agree to 1e-5."""
    command = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2",
        "--cpu", str(ROOT / "run.py"), *small, *FULL, "run_dir=run", "compute.sharding=fsdp",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as both:
        alone = job(*FULL)
        told = both.communicate(timeout=300)[0]
    assert alone.code == 0, alone.text
    assert both.returncode == 0, told
    assert told.count("evaluate: tiny_prose") == 3, "one of two processes speaks"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    compared = [key for key in alone.report if not any(part in key for part in NOT_COMPARED)]
    assert alone.report.keys() == report.keys() and len(compared) > 90
    for key in compared:
        one, other = alone.report[key], report[key]
        if isinstance(one, float):
            wanted = 1e-3 if key.startswith("finetuned/") else 1e-6
            assert other == pytest.approx(one, rel=wanted, abs=wanted), key
        elif isinstance(one, int) or key.startswith(("fingerprint/", "artifact/")):
            assert one == other, key
    curves = [
        [json.loads(row) for row in (tmp_path / folder / "curve.jsonl").read_text().splitlines()]
        for folder in ("job", "run")
    ]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    for row, same in zip(*curves, strict=True):
        for key in ("loss", "validation_loss", "distillation"):
            assert same.get(key) == pytest.approx(row.get(key), abs=1e-5), key
