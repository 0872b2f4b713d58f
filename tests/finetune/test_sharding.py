"""Layers divided among processes: the same steps, whatever the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dividing import RECIPES, train_all, training
from running import start_two

from moe_lab.finetune.state import read_state
from moe_lab.finetune.training import STATE

PROCESS = """
import sys
from pathlib import Path
import torch
import dividing
from moe_lab import processes
torch.set_num_threads(1)
dividing.train_all(Path(sys.argv[1]), ("none", "fsdp"))
processes.close()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recipes by one process, by two, and by two that divide the layers."""
    home = tmp_path_factory.mktemp("divided")
    (home / "one").mkdir()
    started = start_two(PROCESS, str(home))
    train_all(home / "one", ("none",))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    return home


def rows(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "curve.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(home: Path, name: str, sharding: str) -> None:
    alone, both = rows(home / "one" / "none" / name), rows(home / sharding / name)
    assert len(both) == len(alone) > 3
    for one, other in zip(alone, both, strict=True):
        assert one.keys() == other.keys()
        numbers = {key: value for key, value in one.items() if isinstance(value, float)}
        norm = numbers.pop("gradient_norm", 0.0)
        # Dropping reroutes: a token between two experts goes by the rounding of sums.
        near = 1e-4 if name == "dropping" else 1e-5
        assert {key: other[key] for key in numbers} == pytest.approx(numbers, abs=near), name
        assert other.get("gradient_norm", 0.0) == pytest.approx(norm, rel=1e-4)
        assert one.get("dropped") == other.get("dropped")


@pytest.mark.parametrize("name", RECIPES)
def test_a_divided_training_is_finished_by_one(home: Path, name: str, tmp_path: Path) -> None:
    """From the state that it leaves: the weights that one process would have trained."""
    whole = training(name, "none", tmp_path)
    whole.run()
    state = home / "fsdp" / name / STATE
    assert int(read_state(state)["done"]) == whole.done
    finished = training(name, "fsdp", state.parent)  # alone there is nothing to divide
    finished.run()
    assert len(rows(state.parent)) == len(rows(tmp_path))
    ours, theirs = finished.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        # Adam amplifies the rounding of gradients near 0 to a step's size; few are.
        assert (weight - theirs[key]).abs().mean() < 1e-4, key
        assert torch.isfinite(weight).all()
