"""What a policy is: from accesses, a cache and a machine to what became of each access."""

from __future__ import annotations

from moe_lab.offload.accesses import Accesses
from moe_lab.offload.memory import Device, Memory
from moe_lab.offload.replay import Replayed
from moe_lab.option import Plugin, check_options


class Policy(Plugin):
    """The base of all policies; its options are its parameters. A file has one class of this."""

    def __post_init__(self) -> None:
        check_options(self, "--policy")

    def check(self, accesses: Accesses, memory: Memory) -> None:
        """Refuse a cache that it cannot work with, before any replay."""

    def replay(self, accesses: Accesses, memory: Memory, machine: Device) -> Replayed:
        """What becomes of each access, in order."""
        raise NotImplementedError
