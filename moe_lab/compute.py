"""Where and how to compute: never part of what a result is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_lab.types import UserError


@dataclass(frozen=True)
class Compute:
    """device: auto, cpu, cuda or cuda:N; batch_size: samples in a forward; threads: of the CPU.

    cache_gib: memory for activations and layers that a search needs again; the rest goes to disk.
    """

    device: str = "auto"
    batch_size: int = 16
    threads: int | None = None
    cache_gib: float = 4.0

    def start(self) -> Compute:
        """The same with the device chosen and the number of threads set; UserError if not there."""
        import torch

        if self.batch_size < 1:
            raise UserError(f"compute.batch_size must be at least 1, got {self.batch_size}")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"compute.threads must be at least 1, or null, got {self.threads}")
        if self.cache_gib < 0:
            raise UserError(f"compute.cache_gib must be at least 0, got {self.cache_gib}")
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

    def machine(self) -> str:
        """What a timing was measured on."""
        import platform

        import torch

        if self.device.startswith("cuda"):
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
