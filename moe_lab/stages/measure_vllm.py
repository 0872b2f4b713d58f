"""Measure in vLLM: what it serves of each variant in a second (`moe_lab.measure.vllm`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lab.dependencies import code_version
from moe_lab.files import FIGURES_FILE
from moe_lab.integrity import write_whole
from moe_lab.measure import vllm_script
from moe_lab.measure.vllm import ThroughVllm, Vllm, check_plugin, served_per_second
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

TURNS_FILE = "turns.json"
NOT_OF_VLLM = ("python", "batch_size", "decode_tokens")  # options that decide none of its figures


@dataclass(frozen=True)
class Serving:
    """Variants by name, "dense" among them, how they are served, and by what."""

    variants: Mapping[str, Checkpoint]
    how: ThroughVllm
    vllm: Vllm


def serve_variants(context: Context, asked: Serving) -> Artifact:
    """A folder with figures.json, flat, and turns.json: which vLLM, and the seconds of each turn.

    The machine is part of the identity, and so are the versions of vLLM and what it stands on; not
    where its environment lies.
    """
    variants = asked.variants
    how = {name: value for name, value in asdict(asked.how).items() if name not in NOT_OF_VLLM}
    identity = {
        "checkpoints": {name: checkpoint.fingerprint for name, checkpoint in variants.items()},
        "dtypes": {name: checkpoint.dtype for name, checkpoint in variants.items()},
        "how": how,
        "versions": dict(asked.vllm.versions),
        "machine": context.compute.machine(),
        "code": code_version(serve_variants, type(asked.how), vllm_script),
    }

    def make(folder: Path) -> None:
        for name, checkpoint in variants.items():
            check_plugin(asked.vllm, name, checkpoint)
        figures, turns = served_per_second(variants, asked.how, asked.vllm)
        told = {"engine": asked.vllm.named, "turns": turns}
        write_whole(folder / TURNS_FILE, json.dumps(told, indent=1) + "\n")
        write_whole(folder / FIGURES_FILE, json.dumps(figures, indent=1) + "\n")

    return context.store.get("measure_vllm", identity, make)


def _inputs(run: Run) -> dict[str, Serving]:
    how = run.parts.measure
    if not isinstance(how, ThroughVllm):
        return {}
    whole = {name: one for name, one in run.all_variants.items() if one.top_k is None}
    return {"measure_vllm": Serving(whole, how, how.installed())}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.report |= json.loads((result.folder / FIGURES_FILE).read_text())
    run.report["measure/engine"] = json.loads((result.folder / TURNS_FILE).read_text())["engine"]


STAGE = Stage(_inputs, serve_variants, _read)
