"""The layering: a file imports only from lower floors, and never a sibling plug-in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; packages stand for all their files. A new file needs a floor.
FLOORS = (
    {"types"},
    {
        "store",
        "text",
        "tokens",
        "report",
        "progress",
        "compute",
        "divergence",
        "card",
        "options",
        "depth",
        "merging",
        "stand_ins",
        "plots",
        "logs",
        "logbook",
    },
    {"data", "moe", "tasks", "families", "reports", "tensorboard", "lineage", "jobs"},
    {"pivot", "pictures", "track", "cleaning", "listing"},
    {"comparison", "page", "rerun"},
    {"layouts"},
    {"expected"},
    {"tables", "runs"},
    {"similarity", "routing", "weights", "editing"},
    {"observing", "checkpoint", "sums"},
    {"statistics", "layerwise", "saving"},
    {"stream", "held_out", "diagnosis", "agreement"},
    {"evidence", "teacher"},
    {"expert_search", "layer_search", "reconstruction"},
    {"propagation", "alignment"},
    {"metrics", "ratios", "condense", "finetune", "layer_choice"},
    {"grouping"},
    {"methods"},
    {"stages"},
    {"job"},
    {"sweep"},
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}

# Who alone may import what: the first match counts, so insides come before the whole.
ALONE = {
    "transformers.integrations": {"moe", "observing"},
    "transformers.core_model_loading": {"layerwise"},
    "transformers.conversion_mapping": {"layerwise"},
    "transformers.modeling_utils": {"layerwise"},
    "transformers.models": {"moe"},
    "transformers": {
        "moe",
        "observing",
        "checkpoint",
        "layerwise",
        "saving",
        "stages.measure",
    },
    "wandb": {"track"},
    "hydra": {"run", "sweep"},
}
# The package's own face: lazy entry points, so that `import moe_lab` stays light.
FACE_IMPORTS = {"checkpoint", "saving"}


def module_of(path: Path) -> str:
    """Dotted name below moe_lab: "stages.measure", "metrics" for its __init__, "" for ours."""
    parts = path.relative_to(ROOT / "moe_lab").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted((ROOT / "moe_lab").rglob("*.py"))}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Each import, also those inside functions: its line and what it names, dots and all."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def own_module(name: str) -> str:
    """The module of ours behind a full name: moe_lab.methods.metrics.reap.Reap is metrics.reap."""
    parts = name.split(".")[1:]
    first = parts[0] if parts and parts[0] in FLOOR_OF else ""
    while parts and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts) or first


def why_not(module: str, name: str) -> str | None:
    """Why `module` may not import `name`; None where it may."""
    if name.startswith("."):
        return "relative imports hide floors: write moe_lab.…"
    for guarded, allowed in ALONE.items():
        if f"{name}.".startswith(f"{guarded}."):
            inside = any(f"{module}.".startswith(f"{owner}.") for owner in allowed)
            return None if inside else f"only {', '.join(sorted(allowed))} may import {guarded}"
    if name.split(".")[0] != "moe_lab":
        return None
    other = own_module(name)
    if module == "":
        return None if other in FACE_IMPORTS else f"the package's face offers only {FACE_IMPORTS}"
    if other == "":
        return "nothing inside moe_lab imports the package's face"
    package, other_package = module.split(".")[0], other.split(".")[0]
    if package == other_package:
        is_base = module.startswith(f"{other}.") and FILES[other].stem == "__init__"
        is_part = package == "tasks" and other.startswith(f"{module}.")  # of one task's own package
        return None if is_base or is_part else f"{other} is a sibling plug-in"
    if FLOOR_OF[other_package] >= FLOOR_OF[package]:
        return f"{other} is on floor {FLOOR_OF[other_package]}, {module} on {FLOOR_OF[package]}"
    return None


def test_every_file_has_a_floor() -> None:
    homeless = {name.split(".")[0] for name in FILES} - set(FLOOR_OF) - {""}
    assert not homeless, f"give it a floor in tests/test_floors.py: {sorted(homeless)}"


@pytest.mark.parametrize("module", FILES, ids=lambda name: name or "moe_lab")
def test_imports_only_from_below(module: str) -> None:
    path = FILES[module]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}: {reason}"
        for line, name in imports(path.read_text(encoding="utf-8"))
        if (reason := why_not(module, name))
    ]
    assert not wrong, "\n".join(wrong)


def test_run_leaves_tracking_to_track() -> None:
    names = [name for _, name in imports((ROOT / "run.py").read_text(encoding="utf-8"))]
    assert any(name.split(".")[0] == "hydra" for name in names)
    assert not [name for name in names if name.split(".")[0] in ("wandb", "transformers")]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("store", "from moe_lab.report.report import write"),
        ("store", "import moe_lab.stages.measure"),
        ("moe", "def f():\n    from moe_lab import statistics"),
        ("stages.plan", "from moe_lab.stages.measure import measure"),
        ("metrics.reap", "from moe_lab.methods.metrics.base import frequency"),
        ("metrics.reap", "from . import frequency"),
        ("metrics.reap", "from moe_lab import load"),
        ("stages.plan", "import wandb"),
        ("track", "from hydra import main"),
        ("data", "from transformers import AutoTokenizer"),
        ("checkpoint", "from transformers.models.auto import x"),
        ("checkpoint", "from transformers import models"),
        ("", "from moe_lab.stages.outputs import plan"),
    ],
)
def test_the_test_can_fail(module: str, line: str) -> None:
    assert [reason for _, name in imports(line) if (reason := why_not(module, name))]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("stages.plan", "from moe_lab import moe, statistics"),
        ("methods.prune", "from moe_lab.methods.base import Condense"),
        ("condense.experts.greedy_js", "from moe_lab.methods.condense.base import Choice"),
        ("moe", "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS"),
        ("track", "import wandb.util"),
        ("store", "import transformers_stream"),
    ],
)
def test_what_is_allowed(module: str, line: str) -> None:
    assert not [reason for _, name in imports(line) if (reason := why_not(module, name))]
