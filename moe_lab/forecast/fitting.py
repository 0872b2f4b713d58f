"""Whether what a run needs is there: memory of the device, room on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_lab.forecast.cards import Card
from moe_lab.forecast.costs import Costs
from moe_lab.forecast.need import Need
from moe_lab.forecast.remedies import remedy_of
from moe_lab.forecast.work import Work


@dataclass(frozen=True)
class Machine:
    """Where a run is foreseen: on a card, or with None on the processor here.

    memory: bytes of the device; threads: of the processor; free: bytes on the store's disk.
    """

    card: Card | None
    title: str
    memory: float
    threads: int
    free: float

    def seconds(self, need: Need, costs: Costs) -> float:
        """How long a stage takes: computing, and reading and writing weights."""
        moved = (need.read + need.kept) / costs.copy_rate
        if self.card is None or not need.on_device:
            return need.seconds / self.threads + moved
        return need.flops / self.card.rate(need.itemsize) + moved


def left_to_do(found: Iterable[Need]) -> list[Need]:
    """The stages whose results are not there, as far as that is known."""
    return [need for need in found if not need.cached]


def disk_bytes(found: Sequence[Need]) -> float:
    """What results take, and the most that a stage takes besides while it works."""
    return sum(need.kept for need in found) + max((need.scratch for need in found), default=0.0)


def disk_shortage(found: Sequence[Need], free: float) -> str | None:
    """In words what does not go onto a disk; None where it does."""
    needed = disk_bytes(found)
    if needed <= free:
        return None
    parts = ", ".join(
        f"{need.stage} {_gib(need.kept)}" for need in found if need.kept > needed / 100
    )
    return f"this run needs about {_gib(needed)} of disk ({parts}), and {_gib(free)} are free"


def memory_shortage(
    found: Sequence[Need], work: Work, machine: Machine, costs: Costs
) -> str | None:
    """In words which stage does not fit into memory, and what makes it fit; None where all do.

    On a card the libraries' own memory is the host's.
    """
    own = costs.process_bytes if machine.card is None else 0.0

    def fits(need: Need) -> bool:
        return need.memory + own <= machine.memory

    here = [need for need in found if need.on_device or machine.card is None]
    told = []
    for need in (one for one in here if not fits(one)):
        way = remedy_of(need, work, costs, fits)
        told.append(f"{need.stage} needs {_gib(need.memory + own)} ({way or 'nothing helps'})")
    if not told:
        return None
    return f"{machine.title} has {_gib(machine.memory)} of memory, and {'; '.join(told)}"


def _gib(size: float) -> str:
    small = size < 2**30 / 100
    return f"{size / 2**20:.2f} MiB" if small else f"{size / 2**30:.3g} GiB"
