"""What a method may look at, where there is no more than statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import tiny_batch, tiny_model
from torch import Tensor

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


def test_tensors_of_layers_come_back_by_layer() -> None:
    """Also where the memory gives them in the order of their names."""
    statistics = collect_statistics(tiny_model("mixtral"), [tiny_batch()])
    kept: dict[str, dict[str, Tensor]] = {}

    def remember(identity: dict, work: Callable, code: list) -> dict[str, Tensor]:
        key = identity["question"]
        if key not in kept:
            kept[key] = dict(sorted(work().items(), reverse=True))
        return kept[key]

    profile = Profile(statistics, remember_tensors=remember)
    found = {
        layer.info.index: {"a.b": torch.tensor(layer.info.index), "c": torch.ones(2)}
        for layer in statistics
    }
    for made in (found, {}):  # the second time nothing is made
        answers = profile.by_layer({"question": "x"}, lambda made=made: made, [])
        assert [int(one["a.b"]) for one in answers] == [0, 1, 2, 3]
        assert all(one.keys() == {"a.b", "c"} for one in answers)
