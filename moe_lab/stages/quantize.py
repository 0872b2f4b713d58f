"""Quantize: the matrices of what a run has made are stored in few bits, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import CHECKPOINT, FIGURES_FILE, FORM, PLAN
from moe_lab.integrity import write_whole
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import Plan
from moe_lab.models.matrices import matrices_of
from moe_lab.models.packed_writing import write_packed
from moe_lab.models.weight_files import size_in_bytes
from moe_lab.quantize.base import QuantizeJob, Quantizer, check_unquantised
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

VARIANT = "quantized"


@dataclass(frozen=True)
class Quantization:
    """A checkpoint, a quantizer with its composed options, and calibration text where it asks."""

    source: Checkpoint
    quantizer: Quantizer
    options: Mapping[str, Any]
    tokens: Tokens | None = None

    def identity(self) -> dict[str, Any]:
        """What the quantized checkpoint depends on."""
        return {
            "checkpoint": self.source.fingerprint,
            "texts": self.source.texts_fingerprint,
            "quantizer": self.quantizer.identity(self.options),
            "data": self.tokens.fingerprint if self.tokens else None,
            "code": code_version(quantize, self.quantizer),
        }


def quantize(context: Context, asked: Quantization) -> Artifact:
    """A folder with checkpoint/, form.json and figures.json."""

    def make(folder: Path) -> None:
        job = _job(asked, folder, context.compute)
        asked.quantizer.check(job.chosen)
        asked.quantizer.check_size(job.chosen)
        at_work = asked.quantizer.begin(job)
        form = asked.quantizer.form(job, at_work)
        lost = write_packed(
            job.checkpoint, job.matrices, job.chosen, form, at_work.layer, folder / CHECKPOINT,
            notes=at_work.notes if asked.quantizer.needs_text else None, finished=at_work.finished,
        )  # fmt: skip
        figures = lost.figures() | at_work.figures()
        write_whole(folder / FIGURES_FILE, json.dumps(figures, indent=1) + "\n")
        told = {"stock": form.stock, "reason": form.reason, "repeated_parameters": 0}
        write_whole(folder / FORM, json.dumps(told) + "\n")

    return context.store.get("quantize", asked.identity(), make)


def _job(asked: Quantization, folder: Path, compute: Compute) -> QuantizeJob:
    check_unquantised(asked.source)
    matrices = matrices_of(asked.source)
    chosen = asked.quantizer.chosen(matrices)
    needs_text = asked.quantizer.needs_text
    return QuantizeJob(
        asked.source, matrices, chosen, folder, asked.tokens, compute if needs_text else None
    )


def _inputs(run: Run) -> dict[str, Quantization]:
    asked = run.parts.quantize
    notes = Plan.load(run.results["plan"].folder / PLAN).notes
    quantizer = asked and asked.obeying(notes)
    if quantizer is None:
        return {}
    tokens = run.texts["calibration"] if quantizer.needs_text else None
    return {"quantize": Quantization(run.tuned, quantizer, run.config["quantize"], tokens)}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.add_made(VARIANT, result)
    figures = json.loads((result.folder / FIGURES_FILE).read_text())
    run.report |= {f"{VARIANT}/{key}": value for key, value in figures.items()}
    run.report[f"{VARIANT}/bytes"] = size_in_bytes(result.folder / CHECKPOINT)


STAGE = Stage(_inputs, quantize, _read)
