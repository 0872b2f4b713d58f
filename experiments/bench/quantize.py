"""Rounding to nearest and packing against reading the file: seconds for the experts of DeepSeekMoE.

A file of some experts (1,408 x 2,048, bfloat16) is read from disk, dropped from the system's cache
before, and once more from its cache; then each matrix is rounded and packed. One thread; the three
take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.models.packing import packed
from moe_lab.models.rounding import Scheme, rounded
from moe_lab.models.stored import stored_in

WIDTH, HIDDEN = 1408, 2048


def written(folder: Path, experts: int) -> Path:
    """A file of the three matrices of so many experts."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    tensors = {
        f"{expert}.{name}": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for expert in range(experts)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "experts.safetensors")
    return folder / "experts.safetensors"


def seconds_to_read(file: Path, cold: bool) -> tuple[float, list[Tensor]]:
    """Reading all tensors; cold: from the disk, as far as the system lets go of its cache."""
    if cold:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    tensors = [one.load() for one in stored_in(file)]
    return time.perf_counter() - started, tensors


def seconds_to_round(tensors: list[Tensor], scheme: Scheme, clip: str) -> float:
    """CPU seconds of rounding and packing all of them."""
    started = time.thread_time()
    for one in tensors:
        packed(rounded(one, scheme, clip=clip), scheme.bits)  # type: ignore[arg-type]
    return time.thread_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = written(Path(folder), asked.experts)
        size = file.stat().st_size / 2**30
        for _ in range(asked.rounds):
            for name, cold in (("read, disk", True), ("read, cache", False)):
                took, tensors = seconds_to_read(file, cold)
                rows.setdefault(name, []).append(took)
            for bits, group in ((8, None), (4, 128), (3, 128), (2, 128)):
                took = seconds_to_round(tensors, Scheme(bits, group), "none")
                rows.setdefault(f"{bits} bits, {group or 'channel'}", []).append(took)
    reading = statistics.median(rows["read, disk"])
    print(f"{size:.2f} GiB of bfloat16; seconds a GiB, and times reading from disk")
    for name, every in rows.items():
        median = statistics.median(every)
        print(f"{name:>16}: {median / size:6.2f} s/GiB  {median / reading:5.2f}x")


if __name__ == "__main__":
    main()
