"""A metric of one's own: one file and one yaml, in the package or outside it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from running import ROOT

from moe_lab.models.edits.plan import Plan

METRIC = '''
from torch import Tensor

from moe_lab.profile.layer import LayerStatistics


def last_first(layer: LayerStatistics, twist: float) -> Tensor:
    """The later an expert stands, the better; where none was chosen often, by its count."""
    return layer["count"].cumsum(0) * twist
'''
YAML = """
_target_: my_research.last_first.last_first
_partial_: true
twist: 2.0
"""

NEURON_METRIC = '''
from typing import Annotated

from torch import Tensor

from moe_lab.methods.metrics.base import of_neurons
from moe_lab.option import Option
from moe_lab.profile.layer import LayerStatistics


@of_neurons(widths="by_expert")
def loudest(
    layer: LayerStatistics, power: Annotated[float, Option("of the largest activation", above=0)]
) -> Tensor:
    """The largest activation of each hidden unit [E, I]."""
    return layer["hidden_max"] ** power
'''
NEURON_YAML = """
_target_: my_research.loudest.loudest
_partial_: true
power: 2.0
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with code and options, on Python's path."""
    home = tmp_path / "home"
    (home / "my_research").mkdir(parents=True)
    (home / "conf" / "metric").mkdir(parents=True)
    (home / "my_research" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(home), prepend=os.pathsep)
    return home


def test_a_metric_from_outside_the_package(
    tmp_path: Path, home: Path, small: list[str], run_py: Callable
) -> None:
    (home / "my_research" / "last_first.py").write_text(METRIC)
    (home / "conf" / "metric" / "last_first.yaml").write_text(YAML)
    options = [
        *small, "method=prune", "metric=last_first", "ratio.ratio=0.5",
        "finetune=none", "eval=none", "measure=none", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = run_py("--config-dir", str(home / "conf"), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "report.json").read_text())["metric"] == "last_first"
    for edit in Plan.load(tmp_path / "run" / "plan.json").edited():
        assert edit.kept == (4, 5, 6, 7)
        assert list(edit.scores) == sorted(edit.scores)


def test_a_criterion_of_neurons_from_outside_the_package(
    tmp_path: Path, home: Path, small: list[str], run_py: Callable
) -> None:
    """One file and one yaml; its function is marked, and says how its units are ranked."""
    (home / "my_research" / "loudest.py").write_text(NEURON_METRIC)
    (home / "conf" / "metric" / "loudest.yaml").write_text(NEURON_YAML)
    options = [
        *small, "method=prune", "method.unit=neurons", "metric=loudest", "metric.power=1",
        "ratio.ratio=0.5", "finetune=none", "eval=none", "measure=none",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = run_py("--config-dir", str(home / "conf"), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["metric"], report["metric/power"]) == ("loudest", 1)
    plan = Plan.load(tmp_path / "run" / "plan.json")
    for edit in plan.edited():
        score_EI = plan.tensors[f"layers.{edit.index}.neuron_scores"]
        kept_EI = plan.tensors[f"layers.{edit.index}.neurons"].bool()
        assert kept_EI.sum() * 2 == kept_EI.numel() and len(set(edit.widths)) > 1
        assert score_EI[kept_EI].min() >= score_EI[~kept_EI].max()


def test_the_readme_s_example_is_all_that_it_takes(
    tmp_path: Path, small: list[str], run_py: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands under "Add a metric" in README.md, word for word: two files and a command."""
    section = (ROOT / "README.md").read_text().partition("## Add a metric")[2].partition("\n## ")[0]
    blocks = re.findall(r"`([\w/.]+)`:\n\n```(\w+)\n(.*?)```", section, flags=re.DOTALL)
    assert [language for _, language, _ in blocks] == ["python", "yaml"]
    assert section.count("```") == 4
    for path, _, text in blocks:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    command = re.search(r"`PYTHONPATH=\. python run\.py ([^`]+)`", section)[1]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    small = [*small, "finetune=none", "eval=none", "measure=none", f"run_dir={tmp_path / 'run'}"]
    done = run_py(*shlex.split(command), *small)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["status"], report["metric"]) == ("ok", "certainty")
