"""What a method may look at, where there is no more than statistics."""

from __future__ import annotations

import pytest
from families import tiny_batch, tiny_model

from moe_lab.methods.condense.method import Condense
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile


def test_statistics_alone_open_no_model() -> None:
    """A search that needs the model says so, and does not decide by something else."""
    profile = Profile(collect_statistics(tiny_model("qwen2_moe"), [tiny_batch()]))
    for asked in (profile.open_stream, profile.open_model):
        with pytest.raises(RuntimeError, match="statistics alone"):
            asked(4)
    with pytest.raises(RuntimeError, match="statistics alone"):
        Condense(num_layers=1, num_routed=1, experts="greedy_js").plan(profile)
    chosen = Condense(num_layers=1, num_routed=1, experts="frequency", layers="last")
    assert [edit.index for edit in chosen.plan(profile).edited()] == [3]


def test_without_a_memory_every_answer_is_made_anew() -> None:
    made: list[int] = []
    for _ in range(2):
        answer = Profile([]).remember({"question": "x"}, lambda: made.append(1) or len(made), [])
    assert answer == len(made) == 2
