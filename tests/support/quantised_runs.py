"""Quantizers that look at text, at work on tiny checkpoints as their stage has them."""

from __future__ import annotations

from pathlib import Path

import torch
from families import tiny_model

from moe_lab.compute import Compute
from moe_lab.data.tokens import Tokens
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.matrices import matrices_of
from moe_lab.models.packed_writing import write_packed
from moe_lab.quantize.base import QuantizeJob, Quantizer, Quantizing


def tokens(number: int = 6, length: int = 12) -> Tokens:
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 96, (number, length), generator=drawn).tolist()
    return Tokens(tuple(tuple(row[: length - place]) for place, row in enumerate(ids)), 0)


def tiny_checkpoint(folder: Path, family: str, **changes: object) -> Checkpoint:
    tiny_model(family, **changes).save_pretrained(folder)
    return Checkpoint(folder)


def job_of(checkpoint: Checkpoint, quantizer: Quantizer, folder: Path) -> QuantizeJob:
    matrices = matrices_of(checkpoint)
    chosen = quantizer.chosen(matrices)
    quantizer.check(chosen)
    quantizer.check_size(chosen)
    folder.mkdir(exist_ok=True)
    return QuantizeJob(checkpoint, matrices, chosen, folder, tokens(), Compute("cpu", batch_size=2))


def written(
    job: QuantizeJob, quantizer: Quantizer, at_work: Quantizing | None = None
) -> Quantizing:
    """The checkpoint is in the job's folder, as its stage writes it."""
    at_work = at_work or quantizer.begin(job)
    write_packed(
        job.checkpoint, job.matrices, job.chosen, quantizer.form(job, at_work), at_work.layer,
        job.folder / "checkpoint", notes=at_work.notes, finished=at_work.finished,
    )  # fmt: skip
    return at_work
