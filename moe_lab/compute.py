"""Where and how to compute: never part of what a result is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lab.types import UserError

PROFILES = ("all", "routers")


@dataclass(frozen=True)
class Compute:
    """device: auto, cpu, cuda or cuda:N; batch_size: samples in a forward; threads: of the CPU.

    cache_gib: memory for activations and layers that a search needs again; the rest goes to disk.
    profile: which statistics a profile has, "all" or those of the "routers" alone, which cost
    less. layerwise: profile with one decoder layer in memory at a time, true, false, or "auto":
    where the weights would take more than half of the device's memory.
    """

    device: str = "auto"
    batch_size: int = 16
    threads: int | None = None
    cache_gib: float = 4.0
    profile: str = "all"
    layerwise: str | bool = "auto"

    def start(self) -> Compute:
        """The same with the device chosen and the number of threads set; UserError if not there."""
        import torch

        if self.batch_size < 1:
            raise UserError(f"compute.batch_size must be at least 1, got {self.batch_size}")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"compute.threads must be at least 1, or null, got {self.threads}")
        if self.cache_gib < 0:
            raise UserError(f"compute.cache_gib must be at least 0, got {self.cache_gib}")
        if self.profile not in PROFILES:
            raise UserError(f"compute.profile={self.profile}: there are {', '.join(PROFILES)}")
        if self.layerwise not in ("auto", True, False):
            raise UserError(f"compute.layerwise={self.layerwise}: there are auto, true, false")
        if self.threads:
            torch.set_num_threads(self.threads)
        cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        there = ["cpu", *(["cuda", *cards] if cards else [])]
        device = there[min(1, len(cards))] if self.device == "auto" else self.device
        if device not in there:
            raise UserError(
                f"compute.device={self.device} is not available here; there is "
                f"{', '.join(there)}, or auto"
            )
        return replace(self, device=device)

    def goes_layerwise(self, weights: int) -> bool:
        """Whether a profile holds one decoder layer at a time; weights: bytes of the model's."""
        if self.layerwise != "auto":
            return bool(self.layerwise)
        return weights > self.memory() / 2

    def memory(self) -> int:
        """Memory of the device in bytes."""
        import psutil
        import torch

        if self.device.startswith("cuda"):
            return torch.cuda.mem_get_info(self.device)[1]
        return psutil.virtual_memory().total

    def machine(self) -> str:
        """What a timing was measured on."""
        import platform

        import torch

        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
