"""Where and how to compute: never part of what a result is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from moe_lab import processes
from moe_lab.option import Option, Plugin, check_options
from moe_lab.provenance import processor
from moe_lab.types import UserError

SHARDINGS = ("none", "fsdp")
PROFILES = ("all", "routers")
HALVES = {"bfloat16": "bf16", "float16": "fp16"}  # and how names of instructions call them
LAYERWISE_BYTES = 2**28  # bytes of weights that a CPU reads a layer at a time at no further cost
CARD_NAMES = ("cpu", "a100", "b200", "h100", "h200", "l4", "l40s", "mi300x", "rtx4090")


@dataclass(frozen=True)
class Compute(Plugin):
    """Where and how to compute."""

    device: Annotated[str, Option("auto, cpu, cuda or cuda:<number>")] = "auto"
    batch_size: Annotated[int, Option("samples in a forward", least=1)] = 16
    batch_tokens: Annotated[
        int, Option("tokens in a forward at most, padding counted, or one longer sample", least=1)
    ] = 16384
    threads: Annotated[
        int | None, Option("of the CPU, null for torch's choice", least=1, most=4096)
    ] = None
    cache_gib: Annotated[
        float,
        Option("memory in GiB for what a search needs again; the rest goes to disk", least=0),
    ] = 4.0
    device_cache_gib: Annotated[
        float | None,
        Option(
            "of a GPU's memory, in GiB, for hidden states, before the machine's is taken; null: a "
            "quarter of what is free",
            least=0,
        ),
    ] = None
    journal_seconds: Annotated[
        float,
        Option(
            "seconds of profiling after which is noted how far it is, so that a killed one goes on "
            "there; longer where noting takes long, 0: after every batch",
            least=0,
        ),
    ] = 60.0
    profile: Annotated[
        str,
        Option(
            "statistics of a profile: all, which every job of a sweep can share, or the routers' "
            "alone, the cheapest pass and enough for metrics that count",
            among=PROFILES,
        ),
    ] = "all"
    layerwise: Annotated[
        str | bool,
        Option(
            "profile with one decoder layer in memory at a time; auto: where the weights would "
            "take more than half of the device's, and on the CPU where they take more than 256 MiB "
            "and than the hidden states of the text",
            among=("auto", True, False),
        ),
    ] = "auto"

    sharding: Annotated[
        str,
        Option(
            "how several processes fine-tune: none, each with the whole model; fsdp, with a part "
            "of each decoder layer, its gradients and the optimizer's state (PyTorch's FSDP2)",
            among=SHARDINGS,
        ),
    ] = "none"
    card: Annotated[
        str | None,
        Option(
            "what a dry run's hours and memory are told for; null: the device that it would run on",
            among=CARD_NAMES,
        ),
    ] = None

    def start(self) -> Compute:
        """The same with the device chosen and the number of threads set; UserError if not there."""
        import torch

        check_options(self, "compute")
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
        if processes.number() > 1:
            device = _of_this_process(device, self.device, len(cards))
        return replace(self, device=device)

    def goes_layerwise(self, weights: float, memory: float | None = None) -> bool:
        """Whether only one decoder layer at a time is to be in memory, or that was asked for.

        weights: bytes of the model's; memory: of the device, where it is not this machine's.
        """
        if self.layerwise != "auto":
            return bool(self.layerwise)
        return weights > (self.memory() if memory is None else memory) / 2

    def profiles_layerwise(
        self, weights: float, states: float, memory: float | None = None
    ) -> bool:
        """Whether a profile does: also where it costs nothing on the CPU, and memory is saved.

        states: bytes of the hidden states of its text, which are then held instead.
        """
        if self.layerwise != "auto" or self.device.startswith("cuda"):
            return self.goes_layerwise(weights, memory)
        return weights > max(LAYERWISE_BYTES, states) or self.goes_layerwise(weights, memory)

    def has_units_for(self, dtype: str) -> bool:
        """Whether the device multiplies numbers of a dtype itself, not by way of wider ones.

        A CPU that does not takes 3 to 20 times as long for half precision as for float32
        (experiments/bench/half_precision.py). What is not known of one counts as there.
        """
        import torch

        if dtype not in HALVES or self.card not in (None, "cpu"):
            return True
        if self.device.startswith("cuda"):
            return dtype == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
        known = torch.cpu.get_capabilities()
        return not known or any(HALVES[dtype] in name and has for name, has in known.items())

    def device_cache(self) -> int:
        """Bytes of a GPU's memory for hidden states; 0 where the device is the machine itself."""
        import torch

        if not self.device.startswith("cuda"):
            return 0
        if self.device_cache_gib is None:
            return torch.cuda.mem_get_info(self.device)[0] // 4
        return int(self.device_cache_gib * 2**30)

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

    def hardware(self) -> str:
        """What a report says of the machine: CPU, cores, memory, and the GPU where one is used."""
        import os

        import psutil

        memory = psutil.virtual_memory().total / 2**30
        told = f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"
        told = f"{told}; {self.machine()}" if self.device.startswith("cuda") else told
        several = processes.number() > 1
        return f"{told}; {processes.number()} processes" if several else told


def _of_this_process(device: str, asked: str, num_cards: int) -> str:
    """The device of one of several processes: each has a card of its own, or all are on the CPU."""
    if device == "cpu" or processes.launched_on_cpu():
        return "cpu"
    if asked not in ("auto", "cuda"):
        raise UserError(
            f"compute.device={asked}: {processes.number()} processes were started, and each takes "
            "a GPU of its own: compute.device=auto, or cpu for all of them"
        )
    if (card := processes.of_machine()) >= num_cards:
        raise UserError(
            f"more processes were started on this machine than its {num_cards} GPUs: start as many "
            "as there are GPUs, or set compute.device=cpu"
        )
    return f"cuda:{card}"
