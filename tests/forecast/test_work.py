"""A run in numbers."""

from __future__ import annotations

from dataclasses import replace

from foreseen_work import some_work

from moe_lab.forecast.work import Text


def test_a_text() -> None:
    text = Text((3, 5, 4), 2)
    assert (text.num_tokens, text.num_batches, text.longest, text.at_once) == (12, 2, 5, 10)
    assert Text((3,), 8).rows == 1
    assert Text((10,) * 8, 8, batch_tokens=20).num_batches == 4


def test_tensors_of_experts_are_copies_and_others_stay_in_files() -> None:
    dense = some_work().dense
    experts = 3 * 8 * 3 * 32 * 16 * 2
    assert dense.expert_bytes == experts
    assert dense.mapped_bytes == dense.bytes - experts
    assert replace(dense, converted=True).mapped_bytes == 0
