"""Trace: which experts each token is sent to, while each variant continues prompts of its own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.files import FIGURES_FILE, TRACE
from moe_lab.integrity import write_whole
from moe_lab.models.checkpoint import Checkpoint, Model, meta_model
from moe_lab.models.layers import moe_layers
from moe_lab.models.stored import dtype_name
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact
from moe_lab.trace.figures import trace_figures
from moe_lab.trace.file import read_trace
from moe_lab.trace.header import TraceHeader
from moe_lab.trace.recorder import traced_layer
from moe_lab.trace.recording import record
from moe_lab.trace.tracing import Tracing, prompts_of

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceOf:
    """A variant of a model, its prompts, and how it is traced."""

    variant: Checkpoint
    prompts: Tokens
    how: Tracing

    def identity(self) -> dict[str, Any]:
        """What the trace depends on."""
        how = self.how
        return {
            "checkpoint": self.variant.fingerprint,
            "dtype": self.variant.dtype,
            "texts": self.variant.texts_fingerprint,
            "prompts": self.prompts.fingerprint,
            "seed": how.prompts.seed,
            "how": [how.new_tokens, how.lookahead, how.batch_size, how.access],
            "code": code_version(trace, type(how)),
        }


def trace(context: Context, asked: TraceOf) -> Artifact:
    """A folder with trace.parquet, and figures.json, which has `trace_figures`."""

    def make(folder: Path) -> None:
        model = asked.variant.load(context.compute.device)
        header = header_of(model, asked)
        record(model, prompts_of(asked.prompts), header, folder)
        figures = trace_figures(read_trace(folder))
        write_whole(folder / FIGURES_FILE, json.dumps(figures, indent=1) + "\n")

    return context.store.get("trace", asked.identity(), make)


def header_of(model: Model, asked: TraceOf) -> TraceHeader:
    """What the trace will say of itself."""
    layers, how = moe_layers(model), asked.how
    traced = tuple(map(traced_layer, layers))
    routed = sum(layer.experts * layer.stored_bytes for layer in traced)
    return TraceHeader(
        model=asked.variant.fingerprint,
        family=layers[0].info.family if layers else "",
        dtype=dtype_name(model.dtype),
        layers=traced,
        resident_bytes=layers[0].info.model_bytes - routed if layers else 0,
        tokenizer=asked.variant.texts_fingerprint,
        data=asked.prompts.fingerprint,
        seed=how.prompts.seed,
        requests=len(asked.prompts.samples),
        new_tokens=how.new_tokens,
        lookahead=how.lookahead,
        batch_size=how.batch_size,
        access=how.access,
    )


def _inputs(run: Run) -> dict[str, TraceOf]:
    how = run.parts.trace
    if how is None:
        return {}
    return {
        f"trace_{name}": TraceOf(variant, run.texts["prompts"], how)
        for name, variant in run.all_variants.items()
        if _is_routed(name, variant)
    }


def _is_routed(name: str, variant: Checkpoint) -> bool:
    """Whether there is an MoE layer left; said where there is none."""
    if moe_layers(meta_model(variant.config)):
        return True
    logger.warning(
        "trace=full: %s has no MoE layer that could be watched (condensed, dropped or factorised "
        "ones are none), so that it has no trace", name,
    )  # fmt: skip
    return False


def _read(run: Run, name: str, result: Artifact) -> None:
    variant = name.removeprefix("trace_")
    figures = json.loads((result.folder / FIGURES_FILE).read_text())
    run.report |= {f"{variant}/trace/{key}": value for key, value in figures.items()}
    run.report[f"{variant}/trace/file"] = str(result.folder / TRACE)


STAGE = Stage(_inputs, trace, _read)
