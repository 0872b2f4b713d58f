"""Profile: all statistics of a model on the calibration set, in one pass."""

from __future__ import annotations

from pathlib import Path

from moe_lab import moe, observing, statistics
from moe_lab.checkpoint import Checkpoint
from moe_lab.compute import Compute
from moe_lab.progress import progress
from moe_lab.store import Artifact, Store, code_version
from moe_lab.tokens import Tokens


def profile(store: Store, checkpoint: Checkpoint, tokens: Tokens, compute: Compute) -> Artifact:
    """A folder with one safetensors file of sums per MoE layer."""

    def make(folder: Path) -> None:
        model = checkpoint.load(compute.device)
        batches = tokens.batches(compute.batch_size, compute.device)
        layers = statistics.collect(model, progress(batches, "profile"))
        statistics.save(layers, folder)

    identity = {
        "model": checkpoint.fingerprint,
        "dtype": checkpoint.dtype,
        "data": tokens.fingerprint,
        "code": code_version(statistics, observing, moe),
    }
    return store.get("profile", identity, make)
