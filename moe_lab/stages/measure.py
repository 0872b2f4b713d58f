"""Measure: what each variant costs, side by side in one process (`moe_lab.measure`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from moe_lab.compute import Compute
from moe_lab.dependencies import code_version
from moe_lab.measure import REFERENCE, Measurement, bytes_on_disk, counted, measure
from moe_lab.models import remapped
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.routers import at_top_k
from moe_lab.store import Artifact, Store, write_whole

MEASURED_FILE = "figures.json"


def measure_stage(
    store: Store, variants: Mapping[str, Checkpoint], how: Measurement, compute: Compute
) -> Artifact:
    """A folder with figures.json: `measure` and `<variant>/bytes` of all variants, flat.

    A variant at another number of experts per token is no model of its own: it is counted on the
    one that has its weights, and has active_parameters and flops_per_token alone. The machine is
    part of the identity: a speed is a property of it as much as of the model.
    """

    def make(folder: Path) -> None:
        whole = {name: one for name, one in variants.items() if one.top_k is None}
        models = {name: checkpoint.load(compute.device) for name, checkpoint in whole.items()}
        vocabulary = next(iter(models.values())).config.vocab_size
        figures = measure(models, vocabulary_size=vocabulary, **asdict(how))
        model_of = {checkpoint.path: models[name] for name, checkpoint in whole.items()}
        for name in (name for name in variants if name not in whole):
            with at_top_k(model := model_of[variants[name].path], variants[name].top_k):
                figures |= counted(name, model, how.prompt_length)
        for name, checkpoint in whole.items():
            figures[f"{name}/bytes"] = bytes_on_disk(checkpoint.path)
            dense_bytes = bytes_on_disk(variants[REFERENCE].path)
            figures[f"{name}/bytes_ratio"] = figures[f"{name}/bytes"] / dense_bytes
        write_whole(folder / MEASURED_FILE, json.dumps(figures, indent=1) + "\n")

    identity = {
        "checkpoints": {name: checkpoint.fingerprint for name, checkpoint in variants.items()},
        "dtypes": {name: checkpoint.dtype for name, checkpoint in variants.items()},
        "how": asdict(how),
        "machine": compute.machine(),
        "code": code_version(measure_stage, measure, remapped),
    }
    return store.get("measure", identity, make)


def figures_of(artifact: Artifact) -> dict[str, float]:
    """What `measure_stage` found."""
    figures: dict[str, float] = json.loads((artifact.folder / MEASURED_FILE).read_text())
    return figures
