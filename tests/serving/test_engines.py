"""Processes of engines: what they answer, and what becomes of the rest where one ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from moe_lab.report.serving import ENGINES
from moe_lab.serving import engines as of_engines
from moe_lab.serving.checkpoints import Served
from moe_lab.serving.engines import Engine, Setting, engines
from moe_lab.types import UserError

HEAD = """
import json, os, sys, time
jobs, answers = sys.argv[1:]
def say(**values):
    with open(answers, "a") as file:
        file.write(json.dumps(values) + "\\n")
"""
READY = HEAD + "say(ready=True)\n"
LOOP = "for job in map(json.loads, open(jobs)):\n"


@pytest.fixture
def engine(tmp_path: Path) -> Callable[[str], Engine]:
    """An engine whose process is this program."""

    def made(code: str) -> Engine:
        worker = ModuleType("worker")
        worker.__file__ = str(tmp_path / "worker.py")
        (tmp_path / "worker.py").write_text(code)
        return Engine("transformers", worker, 1e-4, ("torch",))

    return made


def test_answers_come_in_the_order_of_the_jobs(
    engine: Callable[[str], Engine], few: list[Served]
) -> None:
    code = READY + LOOP + "    say(id=job['id'], tokens=[[job['top'], len(job['options'])]])\n"
    found = list(engine(code).answers(few, Setting("one", {"a": 1})))
    assert [served.name for served, _ in found] == [one.name for one in few]
    assert [answer.tokens for _, answer in found] == [[[20, 1]]] * 3


def test_a_crash_loses_nothing_but_its_own(
    engine: Callable[[str], Engine], few: list[Served]
) -> None:
    code = READY + LOOP + (
        "    if 'prune' in job['id']:\n"
        "        print('it is too much'); sys.stdout.flush(); os._exit(7)\n"
        "    say(id=job['id'], tokens=[[1]])\n"
    )  # fmt: skip
    found = [answer for _, answer in engine(code).answers(few, Setting())]
    assert [one.crashed for one in found] == [False, True, False]
    assert found[1].error == "its process ended with 7: it is too much"
    assert found[2].tokens == [[1]]


def test_one_that_hangs_is_ended(
    engine: Callable[[str], Engine], few: list[Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_engines, "PATIENCE", 1.0)
    code = READY + LOOP + (
        "    if 'unequal' in job['id']:\n"
        "        time.sleep(60)\n"
        "    say(id=job['id'], tokens=[[1]])\n"
    )  # fmt: skip
    found = [answer for _, answer in engine(code).answers(few, Setting())]
    assert [one.error for one in found] == ["", "", "no answer within 1 s"]


def test_one_that_does_not_start_is_told_once(
    engine: Callable[[str], Engine], few: list[Served]
) -> None:
    code = HEAD + "raise ImportError('no such engine')\n"
    with pytest.raises(UserError, match=r"does not start: .*no such engine"):
        list(engine(code).answers(few, Setting()))


def test_the_environment_is_its_own(engine: Callable[[str], Engine], few: list[Served]) -> None:
    code = READY + LOOP + (
        "    error = f\"{os.environ['MINE']} {'PYTHONPATH' in os.environ}\"\n"
        "    say(id=job['id'], error=error)\n"
    )  # fmt: skip
    one = replace(engine(code), environment={"MINE": "yes"})
    assert next(iter(one.answers(few[:1], Setting())))[1].error == "yes False"


def test_versions(engine: Callable[[str], Engine]) -> None:
    one = engine("")
    found = replace(one, packages=("no_torch|torch", "numpy")).versions()
    assert list(found) == ["torch", "numpy"]
    with pytest.raises(UserError, match="none_such is not installed"):
        replace(one, packages=("torch", "none_such|no_such")).versions()
    with pytest.raises(UserError, match="does not run"):
        replace(one, python="/none/such").versions()


def test_vllms_python_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named from the folder where the command is given; a link, which says whose packages."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert engines("bin/python")["vllm"].python == str(tmp_path / "bin" / "python")


def test_all_engines_are_those_of_the_matrix() -> None:
    assert list(engines("python")) == list(ENGINES)
    stock, plugin = engines("python")["vllm"], engines("python")["vllm-plugin"]
    assert stock.environment["VLLM_PLUGINS"] == "" and "VLLM_PLUGINS" not in plugin.environment
    assert engines("python")["transformers"].python == sys.executable
