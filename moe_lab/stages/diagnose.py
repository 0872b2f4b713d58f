"""Diagnose: tables and pictures of what a model's experts do, beside any method or none."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.dependencies import code_version
from moe_lab.diagnose import pictures, similarity
from moe_lab.diagnose import tables as diagnose_tables
from moe_lab.diagnose.diagnosis import Diagnosis
from moe_lab.files import DIAGNOSIS
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layers import num_parameters
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile import all_experts, collect
from moe_lab.profile import layer as profile_layer
from moe_lab.progress import progress
from moe_lab.report.plots import style
from moe_lab.store import DONE, Artifact, Store, write_whole

logger = logging.getLogger(__name__)
MATRICES, FIGURES_FILE = "similarities.safetensors", "figures.json"
Matrices = dict[int, dict[str, Tensor]]  # by layer index and kind


def diagnose(
    store: Store,
    checkpoint: Checkpoint,
    profile: Artifact,
    tokens: Tokens,
    how: Diagnosis,
    compute: Compute,
) -> Artifact:
    """A folder with the tables (CSV), pictures (PNG and PDF), matrices, and figures.json.

    The matrices have their own place (kind `similarity`): other tables and pictures of them cost
    neither weights nor outputs again.
    """
    sample = tokens.take(range(min(how.num_samples, len(tokens.samples))))
    similar = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "data": sample.fingerprint if sample.samples else None,
        "weights": how.weights,
        "code": code_version(similarity, all_experts),
    }

    def measure(folder: Path) -> None:
        matrices: dict[str, Tensor] = {}
        for index, of_layer in _similarities(store, checkpoint, sample, how.weights, compute):
            matrices |= {
                f"{index}/{kind}": matrix.contiguous() for kind, matrix in of_layer.items()
            }
        save_file(matrices, folder / MATRICES)

    def make(folder: Path) -> None:
        source = store.get("similarity", similar, measure).folder / MATRICES
        shutil.copy(source, folder)
        _tell(collect.load_statistics(profile.folder), _by_layer(load_file(source)), folder)

    code = code_version(diagnose_tables, style, pictures, collect, profile_layer)
    identity = {"profile": profile.key, "similarity": similar, "code": code}
    return store.get("diagnose", identity, make)


def copy_diagnosis(diagnosed: Artifact, folder: Path) -> dict[str, float]:
    """Put the files into the run's diagnosis/; returns the model's figures for its report."""
    ignored = shutil.ignore_patterns(DONE, FIGURES_FILE)
    home = shutil.copytree(diagnosed.folder, folder / DIAGNOSIS, ignore=ignored, dirs_exist_ok=True)
    logger.info("diagnose: tables and pictures are in %s", home)
    figures = json.loads((diagnosed.folder / FIGURES_FILE).read_text())
    return {f"{DIAGNOSIS}/{name}": value for name, value in figures.items()}


def _similarities(
    store: Store, checkpoint: Checkpoint, sample: Tokens, weights: bool, compute: Compute
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each MoE layer's matrices, its weights being read once for all."""
    if not weights and not sample.samples:
        return
    batches = sample.batches(compute.batch_size, compute.device)
    cache = Activations(int(compute.cache_gib * 2**30), store.root, compute.device)
    stream = LayerStream(LayerwiseModel(checkpoint, compute.device), batches, cache)
    if weights:
        numbers = sum(num_parameters(layer.experts) for layer in stream.moe.values())
        logger.info("diagnose: the weights of all experts are read, %.3g numbers", numbers)
    runner = all_experts.ExpertSample(stream) if sample.samples else None
    for index in progress(sorted(stream.moe), "diagnose"):
        with _opened(stream, runner, index) as experts:
            matrices = similarity.of_weights(stream.moe[index]) if weights else {}
            if experts is not None:
                matrices |= similarity.of_outputs(experts.chunks())
        yield index, matrices


@contextmanager
def _opened(
    stream: LayerStream, runner: all_experts.ExpertSample | None, index: int
) -> Iterator[all_experts.AllExperts | None]:
    """The layer with its weights in memory: every expert's outputs, or None without a sample."""
    if runner is None:
        with stream.layer(index):
            yield None
        return
    with runner.open(index) as experts:
        yield experts


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
