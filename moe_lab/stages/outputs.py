"""What the stages of a run leave behind, brought into its folder and its report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from moe_lab.diagnose import tables
from moe_lab.files import CHECKPOINT, CURVE, FORM, LAYERS, PLAN, PLANS, TRAINABLE, USAGE
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.edits.plan import Plan, restructure_model
from moe_lab.models.layers import num_parameters
from moe_lab.profile.layer import LayerStatistics
from moe_lab.report.report import write_report
from moe_lab.store import Artifact
from moe_lab.types import LayerInfo


def copy_plan(planned: Artifact, folder: Path, report: dict[str, Any]) -> bool:
    """Put plan.json, and the groups' plans/, into the run's folder; report: gets what it rests on.

    True where plan.json changes anything: a plan for each group changes no checkpoint.
    """
    if (planned.folder / PLANS).is_dir():
        shutil.copytree(planned.folder / PLANS, folder / PLANS, dirs_exist_ok=True)
    shutil.copyfile(planned.folder / PLAN, folder / PLAN)
    plan = Plan.load(folder / PLAN)
    if "statistics" in plan.notes:
        report["statistics"] = plan.notes["statistics"]
    return bool(plan.edited())


def write_usage(profiled: Artifact, folder: Path) -> None:
    """Put usage.csv into the run's folder: layer, expert, tokens, and usage, 1 being even."""
    rows = ["layer,expert,tokens,usage"]
    for values in json.loads((profiled.folder / LAYERS).read_text()):
        info = LayerInfo(**values)
        path = profiled.folder / f"layer_{info.index:03d}.safetensors"
        with safe_open(path, framework="pt") as file:  # two of the sums, of which some are large
            sums = {name: file.get_tensor(name) for name in ("count", "tokens")}
        usage = tables.usage(LayerStatistics(info, sums))
        rows += [
            f"{info.index},{expert},{tokens:.0f},{share:.6g}"
            for expert, (tokens, share) in enumerate(
                zip(sums["count"].tolist(), usage.tolist(), strict=True)
            )
        ]
    (folder / USAGE).write_text("\n".join(rows) + "\n")


def checkpoint_of(artifact: Artifact, dense: Checkpoint) -> Checkpoint:
    """The checkpoint of a finished compress or finetune stage, known by the stage's key."""
    return Checkpoint(artifact.folder / CHECKPOINT, dense.dtype, artifact.key)


def _form(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a checkpoint was saved; nothing more than that it is stock where no stage of ours did."""
    file = checkpoint.path.parent / FORM
    form: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"stock": True}
    return form


TOLD_OF_TRAINING = ("used_expert_", "experts_alive")  # what recipes say of a whole training


class RunReport:
    """Writes what the stages found into a run's report, and the report into the run's folder."""

    def __init__(self, report: dict[str, Any], folder: Path):
        self.report, self.folder = report, folder

    def add_stage(self, stage: str, artifact: Artifact) -> Artifact:
        """Note how long a stage took (when it was made), if it was there, and what it is.

        The report is written after each stage, so that a killed run tells how far it came.
        """
        self.report[f"seconds/{stage}"] = round(artifact.seconds, 3)
        self.report[f"cached/{stage}"] = artifact.cached
        self.report[f"artifact/{stage}"] = f"{artifact.kind}/{artifact.folder.name}"
        write_report(self.folder, self.report)
        return artifact

    def add_checkpoints(self, variants: dict[str, Checkpoint]) -> None:
        """Where each variant lies, whether stock transformers loads it, and what trained in it."""
        for name, checkpoint in variants.items():
            form = _form(checkpoint)
            self.report[f"{name}/checkpoint"] = str(checkpoint.path)
            self.report[f"{name}/stock"] = form["stock"]
            if form.get("repeated_parameters"):
                self.report[f"{name}/repeated_parameters"] = form["repeated_parameters"]
        if "finetuned" in variants:
            self._trained(variants["finetuned"].path.parent, variants["dense"])
            shutil.copy(variants["finetuned"].path.parent / CURVE, self.folder / CURVE)

    def _trained(self, folder: Path, dense: Checkpoint) -> None:
        """How many parameters trained, their share of the dense model's, and the text they saw.

        And from the curve's last row, which share of all tokens had a k-th expert, and the like.
        """
        trained = json.loads((folder / TRAINABLE).read_text())
        total = num_parameters(meta_model(dense.config))
        self.report["finetuned/trainable_parameters"] = trained["parameters"]
        self.report["finetuned/trainable_share"] = trained["parameters"] / total
        for text, seen in trained["texts"].items():
            self.report[f"finetune/{text}"] = ", ".join(seen)
        last = json.loads((folder / CURVE).read_text().splitlines()[-1])
        told = {key: value for key, value in last.items() if key.startswith(TOLD_OF_TRAINING)}
        self.report |= {f"finetune/{key}": value for key, value in told.items()}

    def add_groups(self, planned: Artifact, dense: Checkpoint) -> None:
        """The parameters that a group's experts and all else have, on average over the groups."""
        sizes = []
        for file in sorted((planned.folder / PLANS).glob("*.json")):
            model = meta_model(dense.config)
            restructure_model(model, Plan.load(file).edits)
            sizes.append(num_parameters(model))
        whole = num_parameters(meta_model(dense.config))
        self.report["compressed/parameters"] = sum(sizes) / len(sizes)
        self.report["compressed/parameter_ratio"] = sum(sizes) / len(sizes) / whole

    def add_evaluation(self, name: str, results: dict[str, float]) -> None:
        """The scores of one variant; without its entropy where experts are repeated in it.

        A repeated expert shares its probability with its twin: more entropy, and the same function.
        """
        if f"{name.partition('_top_')[0]}/repeated_parameters" in self.report:
            results = {key: value for key, value in results.items() if key != "routing/entropy"}
        for key, value in results.items():
            self.report[f"{name}/kl" if key == "kl" else f"{name}/eval/{key}"] = value
