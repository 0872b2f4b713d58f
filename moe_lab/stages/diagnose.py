"""Diagnose: tables and pictures of what a model's experts do, beside any method or none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_lab import diagnosis, moe, plots, reconstruction, similarity, statistics
from moe_lab.checkpoint import Checkpoint
from moe_lab.compute import Compute
from moe_lab.layerwise import LayerwiseModel
from moe_lab.progress import progress
from moe_lab.store import Artifact, Store, code_version
from moe_lab.stream import Activations, LayerStream
from moe_lab.tokens import Tokens
from moe_lab.types import UserError

logger = logging.getLogger(__name__)
FOLDER, FILE = "diagnosis", "similarities.safetensors"


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

    def check(self, compute: Compute) -> None:
        """Refuse a profile of the routers alone."""
        if compute.profile == "routers":
            raise UserError(
                "diagnose=full needs the norms of the experts' outputs, which "
                "compute.profile=routers does not collect: set compute.profile=all"
            )


def diagnose(
    store: Store, checkpoint: Checkpoint, tokens: Tokens, how: Diagnosis, compute: Compute
) -> Artifact:
    """A folder with the similarity matrices of every layer's experts, named <layer>/<kind>."""

    def make(folder: Path) -> None:
        found: dict[str, Tensor] = {}
        for index, of_layer in _similarities(store, checkpoint, tokens, how, compute):
            found |= {f"{index}/{kind}": matrix.contiguous() for kind, matrix in of_layer.items()}
        save_file(found, folder / FILE)

    sample = _sample(tokens, how)
    identity = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "data": sample.fingerprint if sample else None,
        "weights": how.weights,
        "code": code_version(similarity, reconstruction, moe),
    }
    return store.get("diagnose", identity, make)


def _sample(tokens: Tokens, how: Diagnosis) -> Tokens | None:
    """The samples on which every expert runs."""
    positions = range(min(how.num_samples, len(tokens.samples)))
    return tokens.take(positions) if positions else None


def _similarities(
    store: Store, checkpoint: Checkpoint, tokens: Tokens, how: Diagnosis, compute: Compute
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each MoE layer's matrices, its weights being read once for all."""
    if not how.weights and not how.num_samples:
        return
    sample = _sample(tokens, how)
    batches = sample.batches(compute.batch_size, compute.device) if sample else []
    cache = Activations(int(compute.cache_gib * 2**30), store.root, compute.device)
    stream = LayerStream(LayerwiseModel(checkpoint, compute.device), batches, cache)
    if how.weights:
        numbers = sum(moe.num_parameters(layer.experts) for layer in stream.moe.values())
        logger.info("diagnose: the weights of all experts are read, %.3g numbers", numbers)
    runner = reconstruction.Sample(stream) if sample else None
    for index in progress(sorted(stream.moe), "diagnose"):
        with _opened(stream, runner, index) as experts:
            found = similarity.of_weights(stream.moe[index]) if how.weights else {}
            if experts is not None:
                found |= similarity.of_outputs(experts.chunks())
        yield index, found


@contextmanager
def _opened(stream: LayerStream, runner: Any, index: int) -> Iterator[Any]:
    """The layer with its weights in memory: every expert's outputs, or None without a sample."""
    if runner is None:
        with stream.layer(index):
            yield None
        return
    with runner.open(index) as experts:
        yield experts


def publish(diagnosed: Artifact, profile: Artifact, folder: Path) -> dict[str, float]:
    """Tables (CSV), matrices and pictures (PNG) into the run's diagnosis/; returns its figures."""
    home = folder / FOLDER
    home.mkdir(exist_ok=True)
    flat = load_file(diagnosed.folder / FILE)
    similarities: dict[int, dict[str, Tensor]] = {}
    for name, matrix in flat.items():
        index, _, kind = name.partition("/")
        similarities.setdefault(int(index), {})[kind] = matrix
    layers = statistics.load(profile.folder)
    tables = diagnosis.tables(layers, similarities, statistics.super_experts(layers))
    tables.save(home)
    save_file(flat, home / FILE)
    lifts = {
        layer.info.index: diagnosis.lift(*diagnosis.coactivation(layer)).numpy() for layer in layers
    }
    plots.draw(tables, lifts, _shown(similarities), home)
    logger.info("diagnose: %s", home)
    return {f"{FOLDER}/{name}": value for name, value in tables.figures().items()}


def _shown(similarities: dict[int, dict[str, Tensor]]) -> dict[str, dict[int, np.ndarray]]:
    """The matrices that are drawn, by kind and layer; of the weights their mean."""
    shown: dict[str, dict[int, np.ndarray]] = {}
    for index, found in sorted(similarities.items()):
        weight = diagnosis.weight_similarity(found)
        every = {"weight": weight, "router": found.get("router"), "output": found.get("output")}
        for kind, matrix in every.items():
            if matrix is not None:
                shown.setdefault(kind, {})[index] = matrix.numpy()
    return shown
