"""The jobs of a sweep, and the place of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from moe_lab.runs import sweep


def test_a_sweep_s_jobs_are_those_that_hydra_makes(composed: Callable[..., Any]) -> None:
    """Of a table's own parameters and of the command line, in the sweeper's order."""
    config = composed("+cd_moe=num_routed", "model=tiny_deepseek")
    with open_dict(config):
        config.hydra.overrides.task = ["model=tiny_deepseek", "condense.num_layers=1,2"]
        made = sweep.jobs(config)
        config.hydra.sweeper._target_ = "hydra_plugins.hydra_optuna_sweeper.OptunaSweeper"
        assert sweep.jobs(config) is None
    assert made[0] == [
        "+cd_moe/scale=tiny", "condense.num_routed=0", "condense.num_layers=1",
        "model=tiny_deepseek",
    ]  # fmt: skip
    assert len(made) == 8


def test_a_job_s_place_says_what_sets_it_apart(tmp_path: Path) -> None:
    asked = {"argv": [], "cwd": ".", "script": "run.py", "python": "python"}
    asked["overrides"] = [["a=1", "b=1"], ["a=1", "b=2"]]
    (tmp_path / "sweep.json").write_text(json.dumps(asked))
    place = sweep.place(tmp_path / "1")
    assert (str(place), place.told) == ("job 1 [2/2]", "b=2")
    assert sweep.place(tmp_path / "other") is None
    assert sweep.place(tmp_path / "a" / "1") is None
    (tmp_path / "sweep.json").write_text(json.dumps(asked | {"overrides": None}))
    assert str(sweep.place(tmp_path / "1")) == "job 1"
