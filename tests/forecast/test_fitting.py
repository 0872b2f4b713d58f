"""Whether it fits, and what is said where it does not."""

from __future__ import annotations

from dataclasses import replace

from foreseen_work import NOTHING, some_work

from moe_lab.forecast.cards import card_named
from moe_lab.forecast.fitting import (
    Machine,
    disk_bytes,
    disk_shortage,
    left_to_do,
    memory_shortage,
)
from moe_lab.forecast.need import Need
from moe_lab.forecast.stages import needs

GIB = 2**30
HERE = Machine(None, "this machine", 8 * GIB, 2, 10 * GIB)


def test_scratch_is_given_back() -> None:
    found = [Need("one", 0, kept=3, scratch=5), Need("two", 0, kept=4, scratch=2)]
    assert disk_bytes(found) == 3 + 4 + 5
    assert disk_bytes([]) == 0


def test_a_disk_that_is_too_small() -> None:
    found = [Need("compress", 0, kept=3 * GIB), Need("plan", 0, kept=1)]
    assert disk_shortage(found, 4 * GIB) is None
    assert disk_shortage(found, GIB) == (
        "this run needs about 3 GiB of disk (compress 3 GiB), and 1 GiB are free"
    )


def test_what_is_there_is_not_made_again() -> None:
    found = [Need("profile", 0, cached=True), Need("plan", 0, cached=None), Need("x", 0)]
    assert [need.stage for need in left_to_do(found)] == ["plan", "x"]


def test_a_memory_that_is_too_small() -> None:
    work = some_work()
    found = list(needs(work, NOTHING))
    assert memory_shortage(found, work, HERE, NOTHING) is None
    measure = next(need for need in found if need.stage == "measure")
    small = replace(HERE, memory=measure.memory - 1)
    told = memory_shortage([measure], work, small, NOTHING)
    assert told is not None and told.startswith("this machine has ")
    assert "measure needs" in told and "measure=none" in told


def test_a_process_has_memory_of_its_own() -> None:
    work = some_work()
    profile = next(needs(work, NOTHING))
    costs = replace(NOTHING, process_bytes=7.9999 * GIB)
    assert memory_shortage([profile], work, HERE, costs) is not None
    on_card = replace(HERE, card=card_named("l4"))
    assert memory_shortage([profile], work, on_card, costs) is None


def test_hours_are_of_the_card() -> None:
    need = Need("profile", 0, read=2e9, flops=1e12, seconds=10.0, itemsize=2)
    assert HERE.seconds(need, NOTHING) == 10 / 2 + 2
    card = card_named("l4")
    assert card is not None
    there = replace(HERE, card=card)
    assert there.seconds(need, NOTHING) == 1e12 / card.rate(2) + 2
    assert there.seconds(replace(need, on_device=False), NOTHING) == 10 / 2 + 2
