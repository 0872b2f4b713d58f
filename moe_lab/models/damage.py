"""Why a model gives numbers that are none: a damaged tensor, or a dtype that is too narrow."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moe_lab.finite import number_word
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.layerwise import computing_dtype
from moe_lab.models.stored import Stored, dtype_name, stored_in
from moe_lab.models.weight_files import weight_files

logger = logging.getLogger(__name__)
WIDER = {
    torch.float16: "model.dtype=bfloat16, or float32",
    torch.bfloat16: "model.dtype=float32",
    torch.float32: "model.dtype=float64",
}


def explained(checkpoints: Mapping[str, Checkpoint], layer: int | None = None) -> str:
    """What is wrong with the first of these checkpoints that has something, and what to try.

    checkpoints: by what they are called. layer: the decoder layer where numbers were not finite
    first: tensors of those behind it are not looked at. Reads weights, one tensor at a time.
    """
    logger.info("numbers are not finite: looking for the reason in the weights")
    for name, checkpoint in checkpoints.items():
        for stored in _in_order(checkpoint, layer):
            if told := _damage(stored, computing_dtype(checkpoint)):
                return f"The {name} checkpoint at {checkpoint.path}: {told}"
    dtype = computing_dtype(next(iter(checkpoints.values())))
    limit = f", which ends at {torch.finfo(dtype).max:.5g}" if dtype == torch.float16 else ""
    advice = f": try {WIDER[dtype]}" if dtype in WIDER else ""
    return (
        "All weights looked at are finite, so that what the model computes is too large for "
        f"{dtype_name(dtype)}{limit}{advice}"
    )


def _in_order(checkpoint: Checkpoint, layer: int | None) -> Iterator[Stored]:
    """The tensors of its files: of no decoder layer, then layer by layer, up to `layer`."""
    found = [one for file in weight_files(checkpoint.path) for one in stored_in(file)]
    for one in sorted(found, key=lambda one: _place(one.key)):
        if layer is None or _place(one.key)[0] <= layer:
            yield one


def _place(key: str) -> tuple[int, list[str]]:
    """The layer of a tensor, -1 for none, and what sorts expert 10 behind expert 9."""
    numbers = [int(part) for part in key.split(".") if part.isdecimal()]
    return (numbers[0] if numbers else -1), [part.zfill(6) for part in key.split(".")]


def _damage(stored: Stored, dtype: torch.dtype) -> str | None:
    """What a tensor holds that cannot be computed with in this dtype."""
    tensor = stored.load()
    if not tensor.is_floating_point():
        return None
    exact = tensor.float() if tensor.element_size() < 2 else tensor
    if (place := _first(exact)) is not None:
        return (
            f"{stored.key} in {stored.file.name} holds {number_word(float(exact[place]))} at "
            f"{list(place)}{_expert(stored.key, place)}: it is damaged, or was saved so. Get its "
            "files again, or another checkpoint"
        )
    if (place := _first(exact.to(dtype))) is not None:
        return (
            f"{stored.key} in {stored.file.name} holds {float(exact[place]):g} at "
            f"{list(place)}{_expert(stored.key, place)}, and {dtype_name(dtype)} ends at "
            f"{torch.finfo(dtype).max:.5g}: try {WIDER.get(dtype, 'another model.dtype')}"
        )
    return None


def _first(tensor: Tensor) -> tuple[int, ...] | None:
    """The place of the first number that is none."""
    bad = ~tensor.isfinite()
    return tuple(bad.nonzero()[0].tolist()) if bool(bad.any()) else None


def _expert(key: str, place: tuple[int, ...]) -> str:
    """The expert, where its number is in the place and not in the name."""
    fused = "experts" in key and not re.search(r"experts\.\d", key) and "shared" not in key
    return f" (expert {place[0]})" if fused and len(place) > 1 else ""
