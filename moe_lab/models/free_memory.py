"""How much memory is left, as this process may have it."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")  # of a container, or a batch system's job (version 2)


def free_memory(device: str) -> int:
    """Bytes that can still be taken of a device's memory, or of main memory for the CPU.

    A container's or a job's own limit counts, too; what files leave in memory does not.
    """
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + int(kept)
    return min(psutil.virtual_memory().available, _left_of_group())


def _left_of_group() -> int:
    """What the limit of this process's group leaves; 2^63 where it has none."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 2**63
    if limit == "max":
        return 2**63
    used = dict(line.split() for line in lines)
    return max(0, int(limit) - int(used["anon"]) - int(used["slab_unreclaimable"]))
