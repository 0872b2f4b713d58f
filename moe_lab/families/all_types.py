"""Checks of many model types, each in a process of its own, so that a crash ends no other."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe_lab.families.outcome import BAD, Outcome
from moe_lab.families.stock_process import stock_process
from moe_lab.families.tiny import auto_class

# What transformers imports only when a model is made would be imported anew for each.
PRELOADED = [
    "moe_lab.families.checks",
    *(f"transformers.{name}" for name in ("generation.utils", "processing_utils")),
    *(f"transformers.{name}" for name in ("modeling_layers", "masking_utils")),
]
OUTCOMES, OUTPUT = "outcomes.json", "output.txt"


@dataclass(frozen=True)
class Row:
    """A model type, the auto class that opens it, what came of its checks, and how long it took."""

    name: str
    auto: str
    outcomes: dict[str, Outcome]
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether anything went wrong that is no refusal."""
        return any(one.state in BAD for one in self.outcomes.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """The inverse of `to_json`."""
        outcomes = {name: Outcome(**one) for name, one in values["outcomes"].items()}
        return cls(values["name"], values["auto"], outcomes, values["seconds"])


def check_types(names: Sequence[str], processes: int) -> Iterator[Row]:
    """A row for each model type, as they are done; so many at a time."""
    # The server has all imported before it forks; unlike this process it has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting = list(names)
    running: dict[Any, tuple[str, BaseProcess, float]] = {}
    with stock_process() as socket, TemporaryDirectory(prefix="moe_lab_families_") as place:
        while waiting or running:
            while waiting and len(running) < processes:
                name = waiting.pop(0)
                folder = Path(place) / name
                folder.mkdir()
                started = context.Process(target=_work, args=(name, socket, folder))
                started.start()
                running[started.sentinel] = name, started, time.monotonic()
            for sentinel in set(wait(list(running))) & running.keys():
                name, process, begun = running.pop(sentinel)
                process.join()
                outcomes = _read(Path(place) / name, process.exitcode)
                shutil.rmtree(Path(place) / name)
                yield Row(
                    name, auto_class(name).__name__, outcomes, round(time.monotonic() - begun, 1)
                )


def _work(name: str, socket: Path, folder: Path) -> None:
    """In the process of a type: check it, and write down what came of it."""
    with (folder / OUTPUT).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    warnings.simplefilter("ignore")
    import torch

    from moe_lab.families.checks import check_type

    torch.set_num_threads(1)
    outcomes = check_type(name, socket, folder)
    values = {column: dataclasses.asdict(one) for column, one in outcomes.items()}
    (folder / OUTCOMES).write_text(json.dumps(values))


def _read(folder: Path, code: int | None) -> dict[str, Outcome]:
    if (folder / OUTCOMES).is_file():
        values = json.loads((folder / OUTCOMES).read_text())
        return {column: Outcome(**one) for column, one in values.items()}
    last = (folder / OUTPUT).read_text().strip().splitlines()[-1:] or ["nothing"]
    return {"find": Outcome("fault", f"its process ended with {code} and said: {last[0][:200]}")}
