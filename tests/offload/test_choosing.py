"""Policies by name."""

from __future__ import annotations

import pytest

from moe_lab.lookup import names_in
from moe_lab.offload.choosing import POLICIES, policy_of
from moe_lab.offload.policies.base import Policy
from moe_lab.offload.policies.hobbit import Hobbit
from moe_lab.types import UserError


def test_every_file_is_a_policy() -> None:
    names = names_in(POLICIES)
    assert {"lru", "lfu", "min", "moe_infinity", "hobbit", "lru_prefetch"} <= set(names)
    assert all(isinstance(policy_of(name), Policy) for name in names)
    asked = policy_of("hobbit:t1=0,low_share=0.3,low_bits=2")
    assert asked == Hobbit(t1=0.0, low_share=0.3, low_bits=2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("lruu", r"--policy='lruu' does not exist; there are .*lru"),
        ("lru:size=3", r"'size=3' is no option of lru=value; there are none"),
        ("hobbit:t3=1", r"'t3=1' is no option .*t1, t2, low_bits"),
        ("hobbit:t1", r"'t1' is no option"),
        ("hobbit:low_bits=5", r"low_bits=5: there are 8, 4, 3, 2"),
        ("moe_infinity:prefetch=2", r"prefetch=2 must be of the kind of True"),
        ("hobbit:t1=[", r"t1=\[ must be of the kind of 0.6"),
        ("moe_infinity:size=0", r"size=0: it must be at least 1"),
    ],
)
def test_what_does_not_exist_is_refused(asked: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        policy_of(asked)
