"""Options of the fault tests, and what their quick and their long form share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepseek_original
import pytest
import torch
from fault_page import Recorded
from fault_subjects import Subjects
from fuzzed import Effort, Tally
from running import ROOT

FUZZERS = 7  # which share the minutes of --fuzz-minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults", choices=("quick", "long"), default="quick", help="long: all of it")
    group.addoption("--fuzz-minutes", type=float, default=0.0, help="of all fuzzers together")
    group.addoption("--write-faults", type=Path, help="the page that is given the figures")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-faults", default=None) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(config.getoption("--write-faults")), "faults_page")


class Writer:
    """Writes the figures of a session into the page, at its end."""

    def __init__(self, page: Path) -> None:
        self.page, self.recorded = page, Recorded()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.recorded.add(report)

    def pytest_sessionfinish(self) -> None:
        from moe_lab.provenance import commit

        if self.recorded.parts:
            self.recorded.write(self.page, commit())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long ones are left out, not skipped, where they were not asked for."""
    if is_long(config):
        return
    out = [item for item in items if item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def is_long(config: pytest.Config) -> bool:
    """Whether the whole of it was asked for."""
    return config.getoption("--faults", default="quick") == "long"


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    return is_long(request.config)


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property: Any) -> Iterator[Tally]:
    """Counts of a test, which go into docs/faults.md."""
    tally = Tally()
    yield tally
    record_property("faults", asdict(tally))


@pytest.fixture(scope="session")
def effort(request: pytest.FixtureRequest, long: bool) -> Effort:
    minutes = request.config.getoption("--fuzz-minutes", default=0.0)
    return Effort(200, minutes / FUZZERS) if long else Effort(8)


@pytest.fixture(scope="session")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture
def elsewhere(fuzz_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that are no absolute ones lead into a folder of the fuzzers."""
    monkeypatch.chdir(fuzz_folder)
    monkeypatch.setenv("MOE_LAB_ROOT", str(ROOT))


@pytest.fixture(scope="session")
def subjects(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, text_file: Path
) -> Subjects:
    folder = tmp_path_factory.mktemp("undisturbed")
    published = deepseek_original.make(folder / "original", torch.float32)
    return Subjects(folder, checkpoint, published, text_file)
