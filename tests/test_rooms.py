"""Who may import whom: docs/rooms.py has the table, and the code keeps to it."""

from __future__ import annotations

import pytest
from running import ROOT, rooms

CONF = ROOT / "conf"
# The room, or the part of one, of each config group.
HOMES = {
    "calibration": "data",
    "compute": "compute",
    "condense": "methods.condense",
    "diagnose": "diagnose",
    "eval": "evaluate",
    "finetune": "finetune",
    "measure": "measure",
    "method": "methods",
    "metric": "methods.metrics",
    "model": "models",
    "ratio": "methods.ratios",
    "track": "track",
}


def refusals(module: str, source: str) -> list[str]:
    return [reason for _, name in rooms.imports(source) if (reason := rooms.why_not(module, name))]


def test_every_file_has_a_room() -> None:
    homeless = {module for module in rooms.FILES if module} - {
        module
        for module in rooms.FILES
        if rooms.room_of(module) in rooms.ROOMS or rooms.room_of(module) in rooms.GROUND
    }
    assert not homeless, f"give it a room in docs/rooms.py: {sorted(homeless)}"
    there = {rooms.room_of(module) for module in rooms.FILES if module}
    assert there == rooms.ROOMS.keys() | rooms.GROUND.keys()


@pytest.mark.parametrize("module", rooms.FILES, ids=lambda name: name or "moe_lab")
def test_imports_only_what_its_room_may(module: str) -> None:
    path = rooms.FILES[module]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}: {reason}"
        for line, name in rooms.imports(path.read_text(encoding="utf-8"))
        if (reason := rooms.why_not(module, name))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    """Neither among files nor among rooms: each can be understood behind what it imports."""
    for arrows in (rooms.arrows(), rooms.room_arrows()):
        left = {name: set(others) for name, others in arrows.items()}
        while free := [name for name, others in left.items() if not others & left.keys()]:
            for name in free:
                del left[name]
        assert not left, f"these import each other in a circle: {sorted(left)}"


def test_what_may_be_imported_is_imported() -> None:
    """The table has no leave that nobody takes."""
    taken = rooms.room_arrows()
    for room, (_, allowed) in rooms.ROOMS.items():
        assert taken[room] == {name.split(".")[0] for name in allowed}, room


def test_faces_are_short() -> None:
    for module, path in rooms.FILES.items():
        if path.name == "__init__.py":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, module


def test_every_group_of_options_has_its_room() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert groups == HOMES.keys()
    for group, home in HOMES.items():
        path = ROOT / "moe_lab" / home.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{group} has no room {home}"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("store", "from moe_lab.report.report import write_report"),
        ("store", "import moe_lab.stages.measure"),
        ("types", "from moe_lab.store import Store"),
        ("models.layers", "def f():\n    from moe_lab.profile import collect"),
        ("report.figures", "from moe_lab.tables.pivot import Request"),
        ("finetune.training", "from moe_lab.data.source import Texts"),
        ("diagnose.tables", "from moe_lab.report.summary import result_table"),
        ("runs.job", "from moe_lab.stages.pipeline import pipeline"),
        ("stages.plan", "from moe_lab.track.tracker import Tracker"),
        ("methods.metrics.reap", "from moe_lab.methods.metrics import frequency"),
        ("methods.metrics.reap", "from moe_lab.methods.ratios.budget import kept"),
        ("methods.metrics.reap", "from . import frequency"),
        ("methods.metrics.reap", "from moe_lab import load"),
        ("methods.prune", "from moe_lab.methods import merge"),
        ("methods.prune", "from moe_lab.methods.grouping.base import Groups"),
        ("methods.ratios.uniform", "from moe_lab.methods.prune import Prune"),
        ("finetune.seer", "from moe_lab.finetune.experts import Experts"),
        ("stages.plan", "import wandb"),
        ("track.wandb", "from hydra import main"),
        ("run.py", "import wandb"),
        ("run.py", "import transformers"),
        ("measure", "from transformers import PreTrainedModel"),
        ("data.source", "from transformers import AutoTokenizer"),
        ("models.checkpoint", "from transformers.models.auto import x"),
        ("models.checkpoint", "from transformers import models"),
        ("report.summary", "import matplotlib.pyplot"),
        ("stages.evaluate", "import lm_eval"),
        ("", "from moe_lab.stages import plan"),
    ],
)
def test_the_test_can_fail(module: str, line: str) -> None:
    assert refusals(module, line)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("stages.plan", "from moe_lab.models import layers, routers"),
        ("methods.prune", "from moe_lab.methods.ratios.budget import kept"),
        ("methods.merge", "from moe_lab.methods.grouping.base import Groups"),
        ("methods.grouping.ream", "from moe_lab.methods.metrics.reap import reap"),
        ("methods.condense.experts.greedy_js", "from moe_lab.methods.condense import divergence"),
        ("finetune.training", "from moe_lab.data.tokens import Tokens"),
        ("models.layers", "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS"),
        ("track.wandb", "import wandb.util"),
        ("track.wandb", "from moe_lab.files import PLAN"),
        ("store", "import transformers_stream"),
    ],
)
def test_what_is_allowed(module: str, line: str) -> None:
    assert not refusals(module, line)
