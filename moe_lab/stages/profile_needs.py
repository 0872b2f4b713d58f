"""What a profile layer by layer needs at most: said before its work, or refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from moe_lab.compute import Compute
from moe_lab.models.checkpoint import Model
from moe_lab.models.free_memory import free_memory
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import sizes_of
from moe_lab.profile.bounds import Bounds, ProfileRequest, WeightBytes, bounds
from moe_lab.types import UserError

logger = logging.getLogger(__name__)


def bounds_of(
    empty: Model, itemsize: int, asked: ProfileRequest, converted: bool = False
) -> Bounds:
    """What is needed at most, of a model that may be without weights.

    itemsize: of its numbers, in memory; converted: whether files have another dtype.
    """
    sizes = sizes_of(empty)
    weights = WeightBytes(
        sizes.layer * itemsize,
        sizes.outside * itemsize,
        itemsize,
        sizes.widest,
        sizes.eager_heads,
        converted,
    )
    return bounds([layer.info for layer in moe_layers(empty)], weights, asked)


def request_of(
    batches: Sequence[tuple[int, int, int]], compute: Compute, neurons: bool = False
) -> ProfileRequest:
    """What a profile is to do; batches: of one process, each group, samples, tokens of these."""
    return ProfileRequest(
        batches=[(rows, length) for _, rows, length in batches],
        groups=len({group for group, _, _ in batches}),
        neurons=neurons,
        ahead=compute.device.startswith("cuda"),
        cache=int(compute.cache_gib * 2**30) + compute.device_cache(),
    )


def check_needs(needed: Bounds, asked: ProfileRequest, compute: Compute, folder: Path) -> None:
    """Say what is needed at most; UserError where less than the least is there.

    folder: where is written.
    """
    logger.info("profile, layer by layer: %s", needed.in_words())
    free, disk = free_memory(compute.device), shutil.disk_usage(folder).free
    if needed.least > free:
        raise UserError(
            f"this profile needs at least {_gib(needed.least)} of memory on {compute.device}, "
            f"where {_gib(free)} are free: {_way_out(needed, asked, free)}"
        )
    if needed.memory > free:
        logger.warning(
            "this profile may need %s of memory, and %s are free: compute.cache_gib, "
            "compute.batch_tokens and calibration.max_length make it less",
            _gib(needed.memory), _gib(free),
        )  # fmt: skip
    if needed.result > disk:
        raise UserError(
            f"this profile's result takes {_gib(needed.result)} under {folder}, where "
            f"{_gib(disk)} are free: free some space, or choose another disk (store=<folder>)"
        )


def _way_out(needed: Bounds, asked: ProfileRequest, free: int) -> str:
    if needed.weights > free:
        return (
            f"one decoder layer and the embedding take {_gib(needed.weights)}, and less than that "
            "cannot be loaded; another device (compute.device) or machine may have more"
        )
    if any(rows > 1 for rows, _ in asked.batches):
        longest = max(length for _, length in asked.batches)
        return f"take fewer tokens at once (compute.batch_tokens={longest})"
    return "take shorter samples (calibration.max_length)"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
