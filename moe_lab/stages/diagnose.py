"""Diagnose: tables and pictures of what a model's experts do, beside any method or none."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.diagnose import pictures, similarity
from moe_lab.diagnose import tables as diagnose_tables
from moe_lab.diagnose.diagnosis import Diagnosis
from moe_lab.files import DIAGNOSIS, FIGURES_FILE
from moe_lab.integrity import write_whole
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile import collect
from moe_lab.profile import layer as profile_layer
from moe_lab.stages.context import Context
from moe_lab.stages.stage import Stage
from moe_lab.store import DONE, Artifact

if TYPE_CHECKING:
    from moe_lab.stages.run import Run

logger = logging.getLogger(__name__)
MATRICES = "similarities.safetensors"
Matrices = dict[int, dict[str, Tensor]]  # by layer index and kind


@dataclass(frozen=True)
class Diagnosing:
    """A model, its profile on the calibration set, and what is looked at."""

    checkpoint: Checkpoint
    profile: Artifact
    tokens: Tokens
    how: Diagnosis

    @property
    def sample(self) -> Tokens:
        """The samples on which every expert runs."""
        return self.tokens.take(range(len(self.tokens.samples))[: self.how.num_samples])

    def say_fewer(self) -> None:
        """Say where there are fewer samples than were asked for."""
        asked, there = self.how.num_samples, len(self.tokens.samples)
        if asked > there:
            logger.info("asked for diagnose.num_samples=%d, given all %d calibration samples",
                        asked, there)  # fmt: skip


def diagnose(context: Context, asked: Diagnosing) -> Artifact:
    """A folder with the tables (CSV), pictures (PNG and PDF), matrices, and figures.json."""
    similar = _similarity_identity(asked)

    def make(folder: Path) -> None:
        matrices = _similarities(context, asked, similar).folder / MATRICES
        shutil.copy(matrices, folder)
        layers = collect.load_statistics(asked.profile.folder)
        _tell(layers, _by_layer(load_file(matrices)), folder)

    identity = {
        "profile": asked.profile.key,
        "similarity": similar,
        "code": code_version(diagnose, type(asked.how)),
    }
    return context.store.get("diagnose", identity, make)


def _similarity_identity(asked: Diagnosing) -> dict[str, Any]:
    sample = asked.sample
    return {
        "model": asked.checkpoint.fingerprint,
        "dtype": asked.checkpoint.dtype,
        "data": sample.fingerprint if sample.samples else None,
        "weights": asked.how.weights,
        "code": code_version(similarity),
    }


def _similarities(context: Context, asked: Diagnosing, identity: dict[str, Any]) -> Artifact:
    """The matrices have their own place (kind `similarity`).

    Other tables and pictures of them cost neither weights nor outputs again.
    """

    def make(folder: Path) -> None:
        matrices: dict[str, Tensor] = {}
        sample, weights, compute = asked.sample, asked.how.weights, context.compute
        if weights or sample.samples:
            batches = sample.batches(compute.batch_size, compute.device, compute.batch_tokens)
            limit = int(compute.cache_gib * 2**30)
            cache = Activations(limit, context.store.root, compute.device)
            model = LayerwiseModel(asked.checkpoint, compute.device)
            stream = LayerStream(model, batches, cache)
            matrices = similarity.of_model(stream, weights, outputs=bool(sample.samples))
        save_file(matrices, folder / MATRICES)

    return context.store.get("similarity", identity, make)


def copy_diagnosis(diagnosed: Artifact, folder: Path) -> dict[str, float]:
    """Put the files into the run's diagnosis/; returns the model's figures for its report."""
    ignored = shutil.ignore_patterns(DONE, FIGURES_FILE)
    home = shutil.copytree(diagnosed.folder, folder / DIAGNOSIS, ignore=ignored, dirs_exist_ok=True)
    logger.info("diagnose: tables and pictures are in %s", home)
    figures = json.loads((diagnosed.folder / FIGURES_FILE).read_text())
    return {f"{DIAGNOSIS}/{name}": value for name, value in figures.items()}


def _by_layer(flat: dict[str, Tensor]) -> Matrices:
    layers: Matrices = {}
    for name, matrix in flat.items():
        index, _, kind = name.partition("/")
        layers.setdefault(int(index), {})[kind] = matrix
    return dict(sorted(layers.items()))


def _tell(
    layers: list[profile_layer.LayerStatistics], similarities: Matrices, folder: Path
) -> None:
    """Tables, pictures and figures into a folder."""
    tables = diagnose_tables.tables(layers, similarities, collect.super_experts(layers))
    tables.save(folder)
    pairs = {layer.info.index: diagnose_tables.coactivation(layer) for layer in layers}
    lifts = {index: diagnose_tables.lift(*counts).numpy() for index, counts in pairs.items()}
    pictures.draw_experts(tables, lifts, _shown(similarities), folder)
    figures = {key: None if np.isnan(value) else value for key, value in tables.figures().items()}
    write_whole(folder / FIGURES_FILE, json.dumps(figures) + "\n")


def _shown(similarities: Matrices) -> dict[str, dict[int, np.ndarray]]:
    """The matrices that are drawn, by kind and layer; of the weights their mean."""
    shown: dict[str, dict[int, np.ndarray]] = {}
    for index, matrices in similarities.items():
        weight = diagnose_tables.weight_similarity(matrices)
        every = {
            "weight": weight,
            "router": matrices.get("router"),
            "output": matrices.get("output"),
        }
        for kind, matrix in every.items():
            if matrix is not None:
                shown.setdefault(kind, {})[index] = matrix.numpy()
    return shown


def _inputs(run: Run) -> dict[str, Diagnosing]:
    how = run.parts.diagnose
    if how is None:
        return {}
    asked = Diagnosing(run.dense, run.results["profile"], run.texts["calibration"], how)
    asked.say_fewer()
    return {"diagnose": asked}


def _read(run: Run, name: str, result: Artifact) -> None:
    run.report |= copy_diagnosis(result, run.folder)


STAGE = Stage(_inputs, diagnose, _read)
