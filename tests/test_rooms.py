"""Who may import whom: docs/rooms.py has the table, and the code keeps to it; so do the tests."""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import PurePosixPath

import pytest
from running import ROOT, rooms

CONF = ROOT / "conf"
OF_EVERY_FILE = ("logger", "main", "STAGE")
# The room, or the part of one, of each config group.
HOMES = {
    "calibration": "data",
    "compute": "compute",
    "condense": "methods.condense",
    "decoding": "evaluate.decoding",
    "diagnose": "diagnose",
    "eval": "evaluate",
    "finetune": "finetune",
    "form": "methods.factorizing",
    "grouping": "methods.grouping",
    "measure": "measure",
    "method": "methods",
    "metric": "methods.metrics",
    "model": "models",
    "quantize": "quantize",
    "ratio": "methods.ratios",
    "trace": "trace",
    "track": "track",
}
OF_WHOLE_JOBS = "faults/"  # a folder of test files that mirror none
# Test files that mirror no file of moe_lab/, and what each is about.
OF_NO_MODULE = {
    "families/test_families.py": "the table of docs/families.md",
    "faults/test_wrong_requests.py": "what a user can get wrong, in whole jobs",
    "test_config.py": "conf/",
    "test_docs.py": "docs/, README.md and the like",
    "test_experiments.py": "experiments/",
    "test_launchers.py": "the launchers of docs/sweeps.md, in whole sweeps",
    "test_extending.py": "code from outside the package",
    "test_golden.py": "the figures of whole runs",
    "test_gpu.py": "what a GPU computes",
    "test_options_page.py": "docs/options.md and the help",
    "test_models_page.py": "docs/models.md",
    "stages/test_lifetimes.py": "what outlives a stage, in whole jobs",
    "test_not_finite.py": "NaN and infinities, in whole jobs",
    "test_mutations.py": "the list of mutations/",
    "test_real_models.py": "the models of conf/model/ that are on the hub",
    "test_rooms.py": "the package as a whole",
    "test_run.py": "run.py",
    "test_shipped.py": "the models in checkpoints/",
    "track/test_wandb_offline.py": "track/wandb.py without a server",
    "track/test_wandb_online.py": "track/wandb.py with one",
}
SOURCES = {
    path.relative_to(ROOT / "moe_lab").as_posix() for path in (ROOT / "moe_lab").rglob("*.py")
}
TESTS = {
    path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")
}


def mirrored(source: str) -> str:
    """Where the tests of a file lie: models/layers.py has models/test_layers.py."""
    path = PurePosixPath(source)
    return path.with_name(f"test_{path.stem.strip('_')}.py").as_posix()


def untested(sources: Collection[str], tests: Collection[str]) -> list[str]:
    """The files without a test file of their own that need one: all but faces and plug-ins."""
    return sorted(
        source
        for source in sources
        if not source.endswith("__init__.py")
        and not rooms.is_plugin(source.removesuffix(".py").replace("/", "."))
        and mirrored(source) not in tests
    )


def astray(sources: Collection[str], tests: Collection[str]) -> list[str]:
    """The test files that are of no file that exists."""
    found = set(tests) - {mirrored(source) for source in sources} - OF_NO_MODULE.keys()
    return sorted(name for name in found if not name.startswith(OF_WHOLE_JOBS))


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
    assert groups - {"hydra"} == HOMES.keys()
    for group, home in HOMES.items():
        path = ROOT / "moe_lab" / home.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{group} has no room {home}"


def test_every_module_has_its_test_file() -> None:
    found = untested(SOURCES, TESTS)
    assert not found, "; ".join(f"{one}: write tests/{mirrored(one)}" for one in found)


def test_every_test_file_has_its_module() -> None:
    found = astray(SOURCES, TESTS)
    assert not found, f"of what are these? move them, or say it in OF_NO_MODULE: {found}"
    assert OF_NO_MODULE.keys() <= TESTS, "what is gone needs no exception"


def test_every_test_file_has_a_test() -> None:
    texts = {name: (ROOT / "tests" / name).read_text(encoding="utf-8") for name in TESTS}
    assert [name for name, text in texts.items() if "\ndef test_" not in text] == []


def test_a_broken_mirror_is_noticed() -> None:
    assert mirrored("tables/__main__.py") == "tables/test_main.py"
    without = TESTS - {"models/test_layers.py", "methods/test_prune.py", "test_store.py"}
    assert untested(SOURCES, without) == ["models/layers.py", "store.py"], "prune is a plug-in"
    renamed = SOURCES - {"models/layers.py", "methods/prune.py"} | {"models/blocks.py"}
    assert untested(renamed, TESTS) == ["models/blocks.py"]
    assert astray(renamed, TESTS) == ["methods/test_prune.py", "models/test_layers.py"]
    assert astray(SOURCES, TESTS | {"models/test_utils.py"}) == ["models/test_utils.py"]


def public_names(source: str) -> set[str]:
    """The public names that a file defines at its top: functions, classes and constants."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            names |= {one.id for one in ast.walk(target or node) if isinstance(one, ast.Name)
                      and isinstance(one.ctx, ast.Store) and target}  # fmt: skip
    return {name for name in names if not name.startswith("_") and name not in OF_EVERY_FILE}


def test_one_name_is_one_thing() -> None:
    """Plug-ins aside, whose names say their kind (`choose`, `GROUPING`)."""
    homes: dict[str, list[str]] = {}
    for module, path in rooms.FILES.items():
        if not rooms.is_plugin(module):
            for name in public_names(path.read_text(encoding="utf-8")):
                homes.setdefault(name, []).append(module)
    assert {"LayerInfo", "Profile", "figure_text", "PLAN"} <= homes.keys()
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_the_picture_and_the_table_are_those_of_the_code() -> None:
    """After a change of imports: python docs/rooms.py."""
    docs = ROOT / "docs"
    assert (docs / "rooms.svg").read_text(encoding="utf-8") == rooms.drawing()
    page = (docs / "architecture.md").read_text(encoding="utf-8")
    assert page == rooms.with_table(page)


def test_the_floors_are_above_what_they_import() -> None:
    floors = rooms.floors()
    height = {room: floor for floor, row in enumerate(floors) for room in row}
    assert height.keys() == rooms.ROOMS.keys() and len(floors) <= 7
    for room, others in rooms.room_arrows().items():
        assert all(height[other] < height[room] for other in others)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("store", "from moe_lab.report.report import write_report"),
        ("store", "import moe_lab.stages.measure"),
        ("types", "from moe_lab.store import Store"),
        ("models.layers", "def f():\n    from moe_lab.profile import collect"),
        ("report.figures", "from moe_lab.tables.pivot import Request"),
        ("finetune.training", "from moe_lab.data.files import Files"),
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
        ("models.edits.prune", "from moe_lab.models.edits.merge import MergeExperts"),
        ("report.run_files", "from moe_lab.models.layers import moe_layers"),
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
        ("methods.prune", "from moe_lab.models.edits.prune import PruneExperts"),
        ("report.run_files", "from moe_lab.models.edits.plan import Plan"),
        ("models.condensing", "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS"),
        ("track.wandb", "import wandb.util"),
        ("track.wandb", "from moe_lab.files import PLAN"),
        ("store", "import transformers_stream"),
    ],
)
def test_what_is_allowed(module: str, line: str) -> None:
    assert not refusals(module, line)
