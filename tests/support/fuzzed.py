"""Fuzzers: a job in this process, what came of it, and that a refusal is told as one."""

from __future__ import annotations

import itertools
import json
import logging
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
from hypothesis.strategies import SearchStrategy
from running import ROOT, load_module

GIBIBYTES = 4  # more than a process has when a job begins
SECONDS = 30.0  # of one job on a busy machine; many times what one takes


@dataclass(frozen=True)
class Told:
    """What a user sees of a job: nothing where it is done, else the message that refuses it."""

    message: str | None

    @property
    def done(self) -> bool:
        return self.message is None


def told(overrides: Sequence[str], folder: Path, whole: bool = False) -> Told:
    """A job of run.py up to its first stage, in `folder`, which is emptied; whole: to its end.

    AssertionError where it ends otherwise than well or with a message for users: by any other
    exception, by an empty message, one that looks like ours to mend, or after SECONDS.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from moe_lab.runs import job, refusals
    from moe_lab.stages import pipeline

    main = sys.modules.get("run") or load_module("run", ROOT / "run.py")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    message = None
    with (
        mock.patch.object(pipeline, "pipeline", pipeline.pipeline if whole else pipeline.prepare),
        mock.patch.object(job, "_drawn", lambda *_: []),
        _Logged() as raised,
        _within(SECONDS, GIBIBYTES),
    ):
        try:
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                config = compose("run", [f"run_dir={folder}", *overrides], return_hydra_config=True)
                with open_dict(config):
                    config.hydra.runtime.output_dir = str(folder)
                    HydraConfig.instance().set_config(config)
                    del config["hydra"]
            main.main(config)
            code = main.exit_codes.pop()
            report = json.loads((folder / "report.json").read_text())
            message = report["error"]
        except Exception as error:
            code, message = 2, refusals.refusal(error)
            if message is None:
                raise
        finally:
            HydraConfig.instance().cfg = None
    assert (code == 0) == (message is None), (code, message)
    assert code in (0, 2), f"{overrides}: {message}\n{raised}"
    assert message is None or message.strip(), "an empty message"
    return Told(message)


class TooLong(BaseException):
    """No handler of ordinary errors takes it for one."""


@contextmanager
def _within(seconds: float, gibibytes: int) -> Iterator[None]:
    """Raise TooLong where what is done within takes longer, MemoryError where it asks for more."""

    def stop(*_: object) -> None:
        raise TooLong(f"{seconds} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + gibibytes * 2**30, limits[1]))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Logged(logging.Handler):
    """The tracebacks that are logged within."""

    def __enter__(self) -> _Logged:
        self.texts: list[str] = []
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.texts.append(logging.Formatter().formatException(record.exc_info))

    def __str__(self) -> str:
        return "\n".join(self.texts)


@dataclass
class Tally:
    """What a test tried and how much of it came out right; what did not, in words."""

    tried: int = 0
    right: int = 0
    left: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def judge(self, right: bool, otherwise: str) -> None:
        """Count one case."""
        self.tried += 1
        self.right += right
        if not right:
            self.left.append(otherwise)

    def check(self) -> None:
        """Fail where anything is left."""
        assert self.tried, "nothing was tried"
        assert not self.left, f"{len(self.left)} of {self.tried}:\n" + "\n".join(self.left)


@dataclass(frozen=True)
class Effort:
    """How long a fuzzer goes on: so many examples, and more until so many minutes are over."""

    examples: int
    minutes: float = 0.0


def fuzz(
    strategy: SearchStrategy[Any], check: Callable[[Any], Told], effort: Effort, tally: Tally
) -> None:
    """Try examples of a strategy; each place in the code that fails is left once, and told.

    Rounds have the seeds 0, 1, 2, ...: the same examples on every machine.
    """
    until = time.monotonic() + 60 * effort.minutes
    known: set[str] = set()
    refused = 0
    for round_ in itertools.count():

        @hypothesis.seed(round_)
        @hypothesis.settings(
            max_examples=effort.examples,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=[hypothesis.Phase.generate],  # each is short, and shrinking would be minutes
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def one(example: Any) -> None:
            nonlocal refused
            tally.tried += 1
            try:
                refused += not check(example).done
                tally.right += 1
            except Exception as error:
                if place_of(error) in known:
                    return
                raise

        try:
            one()
        except Exception as error:  # noqa: BLE001 - any is what is looked for
            known.add(place_of(error))
            minimal = "; ".join(getattr(error, "__notes__", [])).replace("\n", " ")
            tally.left.append(f"{type(error).__name__}: {str(error)[-2000:]} ({minimal})")
        if time.monotonic() >= until:
            break
    tally.notes["refused"] = str(refused)


def place_of(error: BaseException) -> str:
    """The last line of our code that an error, or the text of one that was logged, came through."""
    text = str(error) if isinstance(error, AssertionError) else ""
    text = text if "Traceback" in text else "".join(traceback.format_exception(error))
    lines = [line for line in text.splitlines() if line.strip().startswith("File ")]
    ours = [line for line in lines if f"{ROOT}/moe_lab/" in line]
    return (ours or lines or [text])[-1].strip()
