"""What all policies share: options out of range are refused."""

from __future__ import annotations

import pytest
from streams import by_chance, memory

from moe_lab.offload.memory import Device
from moe_lab.offload.policies.base import Policy
from moe_lab.offload.policies.hobbit import Hobbit
from moe_lab.offload.policies.moe_infinity import MoEInfinity
from moe_lab.types import UserError


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"--policy\.size=0: it must be at least 1"):
        MoEInfinity(size=0)
    with pytest.raises(UserError, match=r"--policy\.t2=1.5"):
        Hobbit(t2=1.5)


def test_a_policy_says_what_becomes_of_each_access() -> None:
    accesses = by_chance(0)
    at = memory(accesses, 4)
    Policy().check(accesses, at)
    with pytest.raises(NotImplementedError):
        Policy().replay(accesses, at, Device())
