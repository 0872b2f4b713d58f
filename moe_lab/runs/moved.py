"""Where what had another path in version 0.1.0 is now, for yaml files and code of one's own."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Sequence
from pathlib import Path
from pydoc import ErrorDuringImport

from moe_lab.files import PACKAGE
from moe_lab.types import UserError

# Files that became others, by their dotted path below moe_lab; a package's names first.
MODULES = {
    "metrics": "methods.metrics.base",
    "ratios": "methods.ratios.budget",
    "grouping": "methods.grouping.base",
    "condense": "methods.condense.base",
    "methods.condense": "methods.condense.method",
    "methods": "methods.base",
    "finetune": "finetune.recipe",
    "families": "models.families.base",
    "tasks": "evaluate.tasks",
    "plots": "report.plots.style",
    "page": "report.page.page",
    "data": "data.source",
    "tokens": "data.tokens",
    "text": "data.standard_library",
    "moe": "models.layers",
    "routing": "models.routers",
    "stand_ins": "models.remapped",
    "observing": "models.observing",
    "editing": "models.editing",
    "merging": "models.merging",
    "depth": "models.depth",
    "checkpoint": "models.checkpoint",
    "saving": "models.saving",
    "layerwise": "models.layerwise",
    "stream": "models.stream",
    "sums": "profile.layer",
    "statistics": "profile.collect",
    "weights": "profile.weights",
    "evidence": "profile.profile",
    "reconstruction": "profile.all_experts",
    "propagation": "profile.propagate",
    "agreement": "profile.intact_predictions",
    "alignment": "methods.grouping.alignment",
    "layer_choice": "methods.layer_choice",
    "expert_search": "methods.condense.expert_search",
    "layer_search": "methods.condense.layer_search",
    "divergence": "methods.condense.divergence",
    "teacher": "finetune.teacher",
    "held_out": "evaluate.held_out",
    "diagnosis": "diagnose.tables",
    "similarity": "diagnose.similarity",
    "report": "report.report",
    "reports": "report.frame",
    "card": "report.card",
    "pictures": "report.plots.sweep",
    "pivot": "tables.pivot",
    "comparison": "tables.comparison",
    "expected": "tables.expected",
    "layouts": "tables.table",
    "logbook": "track.tracker",
    "track": "track.wandb",
    "tensorboard": "track.tensorboard",
    "lineage": "track.artifacts",
    "job": "runs.job",
    "jobs": "runs.status",
    "sweep": "runs.sweep",
    "options": "runs.options",
    "logs": "runs.logs",
}
# Packages whose files moved together.
PACKAGES = {
    "metrics": "methods.metrics",
    "ratios": "methods.ratios",
    "grouping": "methods.grouping",
    "condense": "methods.condense",
    "families": "models.families",
    "plots": "report.plots",
    "tasks": "evaluate.tasks",
}
# Names that did not go where their file went, or have another name now.
NAMES = {
    "moe.expert_forward": "models.experts.expert_forward",
    "moe.expert_parameters": "models.experts.expert_parameters",
    "editing.condensed": "models.condensing.condensed",
    "statistics.LayerStatistics": "profile.layer.LayerStatistics",
    "evidence.Evidence": "profile.profile.Profile",
    "reconstruction.OpenExperts": "profile.all_experts.AllExperts",
    "reconstruction.Sample": "profile.all_experts.ExpertSample",
    "agreement.Agreement": "profile.intact_predictions.IntactPredictions",
    "ratios.SIZES": "methods.ratios.budget.BUDGET_UNITS",
    "grouping.Candidates": "methods.grouping.base.MergeCandidates",
    "grouping.ranked": "methods.grouping.base.experts_by_score",
    "grouping.hc_smoe.GROUPING": "methods.grouping.hc_smoe.HCSMoE",
    "grouping.m_smoe.GROUPING": "methods.grouping.m_smoe.MSMoE",
    "grouping.ream.GROUPING": "methods.grouping.ream.Ream",
    "methods.Metric": "methods.metrics.base.Metric",
    "condense.Candidates": "methods.condense.base.ExpertCandidates",
    "condense.Layers": "methods.condense.base.LayerCandidates",
    "condense.ranked": "methods.condense.base.ranked_experts",
    "methods.condense.Experts": "methods.condense.expert_choice.ExpertChoices",
    "data.Texts": "data.source.Source",
    "data.StandardLibrary": "data.embedded.StandardLibrary",
    "data.StandardQuestions": "data.embedded.StandardQuestions",
    "data.Rows": "data.rows.Rows",
    "data.Files": "data.files.Files",
    "data.HubDataset": "data.hub.HubDataset",
    "data.Mixture": "data.mixture.Mixture",
    "stream.Activations": "models.activations.Activations",
    "stand_ins.Placed": "models.remapped.RemappedExperts",
    "saving.form_of": "models.forms.form_of",
    "types.Edit": "models.edits.base.Edit",
    "types.Plan": "models.edits.plan.Plan",
    "editing.apply_plan": "models.edits.plan.apply_plan",
    "checkpoint.check_plan": "models.edits.plan.check_plan",
    "finetune.Source": "data.source.Source",
    "finetune.Tuning": "finetune.tuning.Tuning",
    "finetune.DistillingTuning": "finetune.tuning.DistillingTuning",
    "finetune.next_token_loss": "finetune.tuning.next_token_loss",
    "finetune.target_logits": "finetune.tuning.target_logits",
    "finetune.trained": "finetune.tuning.trained",
    "finetune.seer.GateEntropy": "finetune.gate_entropy.GateEntropy",
    "stages.evaluate.Suite": "evaluate.suite.Suite",
    "stages.measure.Measurement": "measure.speed.Measurement",
    "stages.diagnose.Diagnosis": "diagnose.diagnosis.Diagnosis",
    "logbook.Logbook": "track.tracker.Tracker",
    "logbook.Item": "track.tracker.TrackedArtifact",
    "track.Tracker": "track.wandb.WandbTracker",
    "tensorboard.TensorBoard": "track.tensorboard.TensorBoardTracker",
}
# Options that have another name now, and how they are written.
OPTIONS = {
    "method.linkage": "grouping=hc_smoe grouping.linkage=<value>",
    "method.group_size": "grouping=ream grouping.group_size=<value>",
}


def new_path(path: str) -> str | None:
    """Where a dotted path of moe_lab is now; None for one that was never there, or still is."""
    package, _, below = path.partition(".")
    if package != "moe_lab" or not below:
        return None
    if below in NAMES:
        return f"moe_lab.{NAMES[below]}"
    if _is_there(below):
        return None
    parts = below.split(".")
    if len(parts) > 1 and parts[0] in PACKAGES:
        place = f"{PACKAGES[parts[0]]}.{'.'.join(parts[1:])}"
        if _is_there(place):
            return f"moe_lab.{place}"
    for length in range(len(parts), 0, -1):
        if home := MODULES.get(".".join(parts[:length])):
            return ".".join(["moe_lab", home, *parts[length:]])
    return None


def _is_there(place: str) -> bool:
    """Whether a file of ours is at a dotted path, or at the beginning of one."""
    parts = place.split(".")
    files = (PACKAGE.joinpath(*parts[:length]) for length in range(1, len(parts) + 1))
    return any(file.with_suffix(".py").is_file() for file in files)


def refusal_of_target(target: str) -> UserError:
    """The message for a `_target_` that does not exist, with its new path where it has moved."""
    now = new_path(target)
    where = f": it has moved, write _target_: {now}" if now else ""
    return UserError(f"_target_: {target} does not exist{where}")


def refusal_of_option(name: str, there: Sequence[str]) -> UserError:
    """The message for an option that does not exist, with its new name if it has one.

    there: the names that exist in its place.
    """
    if name in OPTIONS:
        return UserError(f"{name} has moved: write {OPTIONS[name]}")
    return UserError(f"{name} is no option; there are {', '.join(there)}")


def refusal_of_import(error: BaseException | None) -> UserError | None:
    """The message for code of one's own that imports from where things were; None for other errors.

    error: an import's, also where it is the cause of another.
    """
    while error is not None:
        if isinstance(error, ErrorDuringImport):
            error = error.value
            continue
        if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "moe_lab":
            frames = traceback.extract_tb(error.__traceback__)
            files = [file for frame in frames if (file := Path(frame.filename)).is_file()]
            if files and PACKAGE not in files[-1].resolve().parents:
                return _told(files[-1])
        error = error.__cause__ or error.__context__
    return None


def _told(file: Path) -> UserError | None:
    """The imports of a file that have moved, as they were and as they are to be written."""
    lines = []
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    for node in (one for one in nodes if isinstance(one, ast.ImportFrom)):
        for alias in node.names:
            now = new_path(f"{node.module}.{alias.name}")
            if now:
                module, _, name = now.rpartition(".")
                lines.append(
                    f"from {node.module} import {alias.name}  ->  from {module} import {name}"
                )
    if not lines:
        return None
    return UserError(f"{file} imports what has moved:\n  " + "\n  ".join(dict.fromkeys(lines)))
