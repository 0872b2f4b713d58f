"""Measure: what each variant costs, side by side in one process (`moe_lab.measure.speed`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.dependencies import code_version
from moe_lab.files import FIGURES_FILE
from moe_lab.integrity import write_whole
from moe_lab.measure.speed import REFERENCE, Measurement, bytes_on_disk, counted, measure
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.opening import text_config
from moe_lab.models.routers import at_top_k
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run


@dataclass(frozen=True)
class Measuring:
    """Variants by name, "dense" among them, and how they are measured.

    A variant at another number of experts per token is no model of its own: it is counted on the
    one that has its weights, and has active_parameters and flops_per_token alone.
    """

    variants: Mapping[str, Checkpoint]
    how: Measurement


def measure_variants(context: Context, asked: Measuring) -> Artifact:
    """A folder with figures.json: `measure` and `<variant>/bytes` of all variants, flat.

    The machine is part of the identity: a speed is a property of it as much as of the model.
    """
    variants = asked.variants
    identity = {
        "checkpoints": {name: checkpoint.fingerprint for name, checkpoint in variants.items()},
        "dtypes": {name: checkpoint.dtype for name, checkpoint in variants.items()},
        "how": asdict(asked.how),
        "machine": context.compute.machine(),
        "code": code_version(measure_variants, type(asked.how)),
    }

    def make(folder: Path) -> None:
        figures = _measured(variants, asked.how, context.compute.device)
        write_whole(folder / FIGURES_FILE, json.dumps(figures, indent=1) + "\n")

    return context.store.get("measure", identity, make)


def _measured(
    variants: Mapping[str, Checkpoint], how: Measurement, device: str
) -> dict[str, float]:
    whole = {name: one for name, one in variants.items() if one.top_k is None}
    models = {name: checkpoint.load(device) for name, checkpoint in whole.items()}
    vocabulary = text_config(next(iter(models.values())).config).vocab_size
    figures = measure(models, vocabulary_size=vocabulary, **asdict(how))
    model_of = {checkpoint.path: models[name] for name, checkpoint in whole.items()}
    for name in (name for name in variants if name not in whole):
        with at_top_k(model := model_of[variants[name].path], variants[name].top_k):
            figures |= counted(name, model, how.prompt_length)
    dense_bytes = bytes_on_disk(variants[REFERENCE].path)
    for name, checkpoint in whole.items():
        figures[f"{name}/bytes"] = bytes_on_disk(checkpoint.path)
        figures[f"{name}/bytes_ratio"] = figures[f"{name}/bytes"] / dense_bytes
    return figures


def _inputs(run: Run) -> dict[str, Measuring]:
    how = run.parts.measure
    return {"measure": Measuring(run.all_variants, how.in_one_process())} if how else {}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.report |= json.loads((result.folder / FIGURES_FILE).read_text())


STAGE = Stage(_inputs, measure_variants, _read)
