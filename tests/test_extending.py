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


def test_a_metric_from_outside_the_package(
    tmp_path: Path, small: list[str], run_py: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "my_research").mkdir(parents=True)
    (home / "conf" / "metric").mkdir(parents=True)
    (home / "my_research" / "__init__.py").touch()
    (home / "my_research" / "last_first.py").write_text(METRIC)
    (home / "conf" / "metric" / "last_first.yaml").write_text(YAML)
    monkeypatch.setenv("PYTHONPATH", str(home), prepend=os.pathsep)
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
