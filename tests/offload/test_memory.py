"""What fits, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from streams import SIZE, by_chance, header

from moe_lab.offload.memory import BYTES_OF_GIB, Device, check_slots, memory_of, slots_in
from moe_lab.types import UserError


def test_slots_are_what_is_left_beside_the_rest_of_the_model() -> None:
    one = header(2, 8, 2, resident_bytes=10 * SIZE)
    assert slots_in(one, 15.5 * SIZE / BYTES_OF_GIB, None) == 5
    assert slots_in(one, 15.5 * SIZE / BYTES_OF_GIB, 4) == int(5.5 * SIZE // (SIZE // 4 + 4 * 2))
    assert slots_in(one, 15.5 * SIZE / BYTES_OF_GIB, None, expert_bytes=500) == 11
    with pytest.raises(UserError, match=r"--memory .*no expert fits beside it"):
        slots_in(one, 10.5 * SIZE / BYTES_OF_GIB, None)


def test_less_than_one_layers_top_k_is_refused() -> None:
    one = header(3, 8, 2)
    check_slots(one, 2, per_layer=False)
    check_slots(one, 6, per_layer=True)
    with pytest.raises(UserError, match=r"room for 1 experts, and a token needs 2"):
        check_slots(one, 1, per_layer=False)
    with pytest.raises(UserError, match=r"a cache for each of 3 layers 6"):
        check_slots(one, 5, per_layer=True)


def test_more_slots_than_experts_are_none() -> None:
    accesses = by_chance(0)
    made = memory_of(accesses, 1000, bits=8)
    assert made.slots == 18 and made.slot_bytes == SIZE // 2 + 4 * 2
    assert made.bytes_K.tolist() == [made.slot_bytes] * 18
    assert memory_of(accesses, 5, expert_bytes=77).bytes_K.tolist() == [77] * 18


def test_computing_is_by_layer_and_token() -> None:
    machine = Device(layer_seconds=2.0, token_seconds=0.5)
    assert machine.compute(np.array([1, 4])).tolist() == [2.5, 4.0]
