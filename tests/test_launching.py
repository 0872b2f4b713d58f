"""accelerate's launcher, which starts one process on a CPU however many it is asked for."""

from __future__ import annotations

import os

import pytest

from moe_lab import launching

WORDS = ["--num_processes", "2", "--cpu", "run.py", "method=prune"]


@pytest.mark.parametrize(
    "command",
    [
        ["/usr/bin/python3", "/usr/bin/accelerate", "launch", *WORDS],
        ["/usr/bin/accelerate", "launch", *WORDS],
        ["python", "/usr/bin/accelerate-launch", *WORDS],
        ["python", "/x/accelerate/commands/launch.py", *WORDS],
    ],
)
def test_what_the_launcher_was_given_is_known(command: list[str]) -> None:
    assert launching.arguments_of(command) == WORDS


@pytest.mark.parametrize(
    "command", [["bash", "-c", "accelerate launch run.py"], ["python", "run.py"], []]
)
def test_other_parents_are_none(command: list[str]) -> None:
    assert launching.arguments_of(command) is None


def test_a_run_by_itself_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of several: who comes back has started nothing."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    launching.start_missing()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "RANK" not in os.environ
    launching.start_missing()  # accelerate is not what has started the tests
    monkeypatch.setenv("RANK", "0")
    launching.start_missing()
