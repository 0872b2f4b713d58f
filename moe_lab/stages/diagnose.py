"""Diagnose: tables and pictures of what a model's experts do, beside any method or none."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab import diagnosis, moe, plots, reconstruction, similarity, statistics, sums
from moe_lab.checkpoint import Checkpoint
from moe_lab.compute import Compute
from moe_lab.layerwise import LayerwiseModel
from moe_lab.plots import experts as expert_plots
from moe_lab.progress import progress
from moe_lab.store import DONE, Artifact, Store, code_version, write_whole
from moe_lab.stream import Activations, LayerStream
from moe_lab.tokens import Tokens
from moe_lab.types import LayerInfo, UserError

logger = logging.getLogger(__name__)
FOLDER, MATRICES, FIGURES = "diagnosis", "similarities.safetensors", "figures.json"
Matrices = dict[int, dict[str, Tensor]]  # by layer index and kind


@dataclass(frozen=True)
class Diagnosis:
    """What is looked at beside the profile, which costs nothing more.

    weights: read all experts, for the similarity of their weights. num_samples: run every expert on
    every token of the first so many calibration samples, for the similarity of their outputs; 0
    leaves it out.
    """

    weights: bool = True
    num_samples: int = 16

    def __post_init__(self) -> None:
        if self.num_samples < 0:
            raise UserError(f"diagnose.num_samples={self.num_samples}: it must be at least 0")

    def check(self, compute: Compute, layers: Sequence[LayerInfo]) -> None:
        """Refuse a profile of the routers alone, and rows of routers without experts of their own.

        The latter have sums, but neither weights nor an output of their own.
        """
        if compute.profile == "routers":
            raise UserError(
                "diagnose=full needs the norms of the experts' outputs, which "
                "compute.profile=routers does not collect: set compute.profile=all"
            )
        for info in layers if self.weights or self.num_samples else ():
            if info.real_experts:
                raise UserError(
                    f"diagnose=full compares the experts' weights and outputs, and of layer "
                    f"{info.index} {info.num_experts} router rows lead to {info.real_experts} "
                    "experts: leave that out with diagnose.weights=false diagnose.num_samples=0"
                )


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
        "code": code_version(similarity, reconstruction, *reconstruction.CODE),
    }

    def measure(folder: Path) -> None:
        found: dict[str, Tensor] = {}
        for index, of_layer in _similarities(store, checkpoint, sample, how.weights, compute):
            found |= {f"{index}/{kind}": matrix.contiguous() for kind, matrix in of_layer.items()}
        save_file(found, folder / MATRICES)

    def make(folder: Path) -> None:
        source = store.get("similarity", similar, measure).folder / MATRICES
        shutil.copy(source, folder)
        _tell(statistics.load(profile.folder), _by_layer(load_file(source)), folder)

    code = code_version(diagnosis, plots, expert_plots, statistics, sums)
    identity = {"profile": profile.key, "similarity": similar, "code": code}
    return store.get("diagnose", identity, make)


def publish(diagnosed: Artifact, folder: Path) -> dict[str, float]:
    """Put the files into the run's diagnosis/; returns the model's figures for its report."""
    ignored = shutil.ignore_patterns(DONE, FIGURES)
    home = shutil.copytree(diagnosed.folder, folder / FOLDER, ignore=ignored, dirs_exist_ok=True)
    logger.info("diagnose: tables and pictures are in %s", home)
    figures = json.loads((diagnosed.folder / FIGURES).read_text())
    return {f"{FOLDER}/{name}": value for name, value in figures.items()}


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
        numbers = sum(moe.num_parameters(layer.experts) for layer in stream.moe.values())
        logger.info("diagnose: the weights of all experts are read, %.3g numbers", numbers)
    runner = reconstruction.Sample(stream) if sample.samples else None
    for index in progress(sorted(stream.moe), "diagnose"):
        with _opened(stream, runner, index) as experts:
            found = similarity.of_weights(stream.moe[index]) if weights else {}
            if experts is not None:
                found |= similarity.of_outputs(experts.chunks())
        yield index, found


@contextmanager
def _opened(
    stream: LayerStream, runner: reconstruction.Sample | None, index: int
) -> Iterator[reconstruction.OpenExperts | None]:
    """The layer with its weights in memory: every expert's outputs, or None without a sample."""
    if runner is None:
        with stream.layer(index):
            yield None
        return
    with runner.open(index) as experts:
        yield experts


def _by_layer(flat: dict[str, Tensor]) -> Matrices:
    found: Matrices = {}
    for name, matrix in flat.items():
        index, _, kind = name.partition("/")
        found.setdefault(int(index), {})[kind] = matrix
    return dict(sorted(found.items()))


def _tell(layers: list[sums.LayerStatistics], similarities: Matrices, folder: Path) -> None:
    """Tables, pictures and figures into a folder."""
    tables = diagnosis.tables(layers, similarities, statistics.super_experts(layers))
    tables.save(folder)
    pairs = {layer.info.index: diagnosis.coactivation(layer) for layer in layers}
    lifts = {index: diagnosis.lift(*counts).numpy() for index, counts in pairs.items()}
    expert_plots.draw(tables, lifts, _shown(similarities), folder)
    figures = {key: None if np.isnan(value) else value for key, value in tables.figures().items()}
    write_whole(folder / FIGURES, json.dumps(figures) + "\n")


def _shown(similarities: Matrices) -> dict[str, dict[int, np.ndarray]]:
    """The matrices that are drawn, by kind and layer; of the weights their mean."""
    shown: dict[str, dict[int, np.ndarray]] = {}
    for index, found in similarities.items():
        weight = diagnosis.weight_similarity(found)
        every = {"weight": weight, "router": found.get("router"), "output": found.get("output")}
        for kind, matrix in every.items():
            if matrix is not None:
                shown.setdefault(kind, {})[index] = matrix.numpy()
    return shown
