"""Finetune: a recipe at work on a checkpoint, resumed where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab import processes
from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT, CURVE, FORM, PLAN, TRAINABLE
from moe_lab.finetune.recipe import Recipe
from moe_lab.finetune.state import TrainedTensors, read_state
from moe_lab.finetune.teacher import Teacher
from moe_lab.finetune.training import STATE, Training
from moe_lab.models.checkpoint import Checkpoint, meta_model
from moe_lab.models.edited_model import Saving
from moe_lab.models.edits.plan import Plan
from moe_lab.models.layers import num_parameters
from moe_lab.models.layerwise import LayerSource, OverlaidModel, WholeModel
from moe_lab.models.quantised import stored_in_few_bits
from moe_lab.models.streamed import write_model
from moe_lab.quantize.base import Quantizer
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)
TOLD_OF_TRAINING = ("used_expert_", "experts_alive")  # what recipes say of a whole training


@dataclass(frozen=True)
class FineTuning:
    """A checkpoint and the plan that it was made with; a recipe, its composed options and texts.

    tokens: by the names that `recipe.sources` gives; taught: what `teach` made, where the recipe
    distils; quantizer: what will store it, with its composed options `stored`, where the recipe
    computes so.
    """

    compressed: Checkpoint
    plan: Artifact
    recipe: Recipe
    options: dict[str, Any]
    tokens: Mapping[str, Tokens]
    seed: int
    taught: Artifact | None = None
    quantizer: Quantizer | None = None
    stored: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, plan: Plan) -> dict[str, Any]:
        """What the tuned checkpoint depends on."""
        identity = {
            "checkpoint": self.compressed.fingerprint,
            "plan": self.plan.key,
            "recipe": self.recipe.identity(self.options),
            "data": {name: part.fingerprint for name, part in self.tokens.items()},
            "seed": self.seed,
            "code": code_version(finetune, self.recipe, *plan.kinds(), *self._quantizers),
        }
        if self.quantizer is not None:
            identity["quantizer"] = self.quantizer.identity(self.stored)
        return identity | ({"teacher": self.taught.key} if self.taught else {})

    @property
    def _quantizers(self) -> tuple[Quantizer, ...]:
        return () if self.quantizer is None else (self.quantizer,)


def finetune(context: Context, asked: FineTuning) -> Artifact:
    """A folder with checkpoint/, form.json, curve.jsonl and trainable.json."""
    recipe, plan = asked.recipe, Plan.load(asked.plan.folder / PLAN)
    recipe.check(plan)

    def make(folder: Path) -> None:
        trained = _trained(context, asked, plan, folder)
        if trained is None:
            return
        mtp, head = plan.notes.get("mtp", "prune"), plan.notes.get("lm_head", "auto")
        how = Saving(None, None, mtp, head, recipe.twins)
        with processes.alone():
            form = write_model(trained, folder / CHECKPOINT, asked.compressed.path, how)
        (folder / FORM).write_text(json.dumps(form.to_json()) + "\n")
        (folder / STATE).unlink(missing_ok=True)

    return context.store.get("finetune", asked.identity(plan), make, together=True)


def _trained(context: Context, asked: FineTuning, plan: Plan, folder: Path) -> LayerSource | None:
    """The tuned model, in the main process alone."""
    recipe, compute, tokens = asked.recipe, context.compute, dict(asked.tokens)
    divides = compute.sharding == "fsdp" and processes.number() > 1
    # Weights that do not train stay as they are stored; what is divided is all of one dtype, and
    # what is dequantised is exact in float32 alone.
    whole = divides or stored_in_few_bits(asked.compressed.config)
    dtype = "float32" if recipe.dtype == "float32" and whole else "auto"
    compressed = dataclasses.replace(asked.compressed, dtype=dtype)
    teacher = Teacher(asked.taught.folder, tokens.values()) if asked.taught else None

    def train(compute: Compute, loaded_to: str) -> Training:
        model = compressed.load(loaded_to)
        training = Training(
            model, plan, recipe, tokens, asked.seed, compute, folder, teacher, context.log
        )
        if asked.quantizer is not None:
            files = asked.compressed.held_by(meta_model(asked.compressed.config))
            training.tuning.as_stored(asked.quantizer.reader, files.dtype)
        training.run()
        return training

    done = train(compute, "cpu" if divides else compute.device)
    if not processes.is_main():
        return None
    if done.divided and done.tuning.is_plain:  # nobody needs to hold it whole
        return OverlaidModel(compressed, TrainedTensors(read_state(folder / STATE)))
    if done.divided:
        del done
        with processes.alone():  # from the state that all have left
            done = train(dataclasses.replace(compute, device="cpu"), "cpu")
    return WholeModel(done.model.cpu())


def told_of_training(folder: Path, dense: Checkpoint) -> dict[str, Any]:
    """How many parameters trained, their share of the dense model's, and the text they saw.

    And from the curve's last row, which share of all tokens had a k-th expert, and the like.
    """
    trained = json.loads((folder / TRAINABLE).read_text())
    total = num_parameters(meta_model(dense.config))
    told = {
        "finetuned/trainable_parameters": trained["parameters"],
        "finetuned/trainable_share": trained["parameters"] / total,
    }
    told |= {f"finetune/{text}": ", ".join(seen) for text, seen in trained["texts"].items()}
    last = json.loads((folder / CURVE).read_text().splitlines()[-1])
    ends = {key: value for key, value in last.items() if key.startswith(TOLD_OF_TRAINING)}
    return told | {f"finetune/{key}": value for key, value in ends.items()}


def _inputs(run: Run) -> dict[str, FineTuning]:
    recipe = run.parts.finetune
    if recipe is None or not run.tunes:
        say_untuned(run)
        return {}
    return {
        "finetune": FineTuning(
            run.compressed, run.results["plan"], recipe, run.config["finetune"],
            run.tuning_texts, run.config["seed"], run.results.get("teacher"),
            *_quantizer_of(run, recipe),
        )
    }  # fmt: skip


def _quantizer_of(run: Run, recipe: Recipe) -> tuple[Quantizer | None, Mapping[str, Any]]:
    """What will store the result, and its options, where the recipe computes so."""
    asked = run.parts.quantize
    if asked is None or not recipe.rounds:
        return None, {}
    notes = Plan.load(run.results["plan"].folder / PLAN).notes
    return asked.obeying(notes), run.config["quantize"]


def say_untuned(run: Run) -> None:
    """Say that nothing is tuned; UserError where a method was to leave something, and did not."""
    recipe, made = run.parts.finetune, Plan.load(run.results["plan"].folder / PLAN)
    if recipe is None or "groups" in made.notes:
        return
    if run.report["method"] != "none":
        recipe.check(made)
    logger.warning(
        "nothing is tuned: finetune=%s trains what is left of compressed layers, and method=none "
        "compresses none (finetune=seer tunes the model as it is)", run.report["finetune"],
    )  # fmt: skip


def _read(run: Run, name: str, result: Artifact) -> None:
    run.add_made("finetuned", result)
    run.report |= told_of_training(result.folder, run.dense)
    shutil.copy(result.folder / CURVE, run.folder / CURVE)


STAGE = Stage(_inputs, finetune, _read)
