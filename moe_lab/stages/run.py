"""One run on its way through the stages: what was asked for, and what is there so far."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lab.data.tokens import Tokens
from moe_lab.evaluate.top_k import with_top_k
from moe_lab.files import CHECKPOINT, FORM
from moe_lab.finetune.recipe import Distilling, sources
from moe_lab.finite import number_word
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.form_kinds import family_named, form_kind
from moe_lab.models.own_config import is_own_form
from moe_lab.report.report import write_report
from moe_lab.report.serving import where_it_runs
from moe_lab.stages.context import Context
from moe_lab.stages.parts import Parts
from moe_lab.store import Artifact
from moe_lab.types import NotFinite


@dataclass
class Run:
    """What the stages of one run take from each other.

    config: the composed options as plain data; parts: the objects that they name; texts: all text,
    by its use; further_top_k: numbers of experts per token at which every variant is evaluated,
    too; folder: the run's own, with `report` in it. Filled in on the way: variants, the checkpoints
    by name ("dense" from the start); results, those of the stages by name.
    """

    config: Mapping[str, Any]
    parts: Parts
    context: Context
    folder: Path
    report: dict[str, Any]
    texts: Mapping[str, Tokens]
    further_top_k: list[int] = field(default_factory=list)
    variants: dict[str, Checkpoint] = field(default_factory=dict)
    results: dict[str, Artifact] = field(default_factory=dict)

    @property
    def dense(self) -> Checkpoint:
        """The model that is compressed."""
        return self.variants["dense"]

    @property
    def compressed(self) -> Checkpoint:
        """What is left of it; the model itself where nothing is edited."""
        return self.variants.get("compressed", self.dense)

    @property
    def tuned(self) -> Checkpoint:
        """What was made so far: fine-tuned where it was, else what is left of the model."""
        return self.variants.get("finetuned", self.compressed)

    @property
    def tunes(self) -> bool:
        """Whether there is something to fine-tune, once the plan was carried out."""
        recipe = self.parts.finetune
        return recipe is not None and ("compress" in self.results or not recipe.needs_edits)

    @property
    def distilling(self) -> Distilling | None:
        """The recipe, where it learns from the intact model."""
        recipe = self.parts.finetune
        return recipe if isinstance(recipe, Distilling) and recipe.distils else None

    @property
    def tuning_texts(self) -> dict[str, Tokens]:
        """The texts of the recipe, by the names that `sources` gives."""
        recipe = self.parts.finetune
        return {name: self.texts[name] for name in (sources(recipe.phases) if recipe else ())}

    @functools.cached_property
    def all_variants(self) -> dict[str, Checkpoint]:
        """The variants, and each at further numbers of experts per token, once all are there."""
        named = self.parts.eval.top_k if self.parts.eval else None
        return with_top_k(self.variants, self.further_top_k, named)

    def add_result(self, name: str, result: Artifact) -> None:
        """Note how long a result took (when it was made), if it was there, and what it is.

        The report is written after each, so that a killed run tells how far it came.
        """
        self.results[name] = result
        self.report[f"seconds/{name}"] = round(result.seconds, 3)
        self.report[f"cached/{name}"] = result.cached
        self.report[f"artifact/{name}"] = f"{result.kind}/{result.folder.name}"
        write_report(self.folder, self.report)

    def check_figures(self, stage: str) -> None:
        """Refuse a figure of the report that is NaN or infinite: what does not exist is absent."""
        for key, value in self.report.items():
            if isinstance(value, float) and not math.isfinite(value):
                del self.report[key]
                raise NotFinite(f"{stage}: the figure {key} is {number_word(value)}")

    def add_made(self, name: str, result: Artifact) -> None:
        """The variant whose checkpoint lies in the result of a stage."""
        self.add_variant(name, checkpoint_of(result, self.dense))

    def add_variant(self, name: str, checkpoint: Checkpoint) -> None:
        """Tell where a checkpoint lies, in which form, and what loads and serves that."""
        self.variants[name] = checkpoint
        form = _form_of(checkpoint)
        self.report[f"{name}/checkpoint"] = str(checkpoint.path)
        self.report[f"{name}/stock"] = form["stock"]
        config, source = (_config_of(one) for one in (checkpoint, self.dense))
        family, kind = family_named(config), form_kind(config, source)
        self.report[f"{name}/family"], self.report[f"{name}/form"] = family, kind
        served = where_it_runs(family, kind).lines().values()
        self.report[f"{name}/serving"] = "; ".join(served)
        if form.get("repeated_parameters"):
            self.report[f"{name}/repeated_parameters"] = form["repeated_parameters"]


def checkpoint_of(result: Artifact, dense: Checkpoint) -> Checkpoint:
    """The checkpoint in the result of a stage, known by the result's key."""
    return Checkpoint(result.folder / CHECKPOINT, dense.dtype, result.key)


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((checkpoint.path / "config.json").read_text())
    return values


def _form_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a checkpoint was saved; where no stage of ours did, whether its config is not ours."""
    file = checkpoint.path.parent / FORM
    if file.is_file():
        form: dict[str, Any] = json.loads(file.read_text())
        return form
    return {"stock": not is_own_form(_config_of(checkpoint))}
