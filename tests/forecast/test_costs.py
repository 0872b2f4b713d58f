"""The measured part of a forecast."""

from __future__ import annotations

from foreseen_work import some_work

from moe_lab.forecast.costs import Costs, calls_of, measured_costs, parts_of_forward, saved_parts
from moe_lab.forecast.work import Text


def test_parts_add_up() -> None:
    costs = Costs({"work": {"constant": 5.0, "states": 2.0}}, {"work": {"flops": 0.5}}, {}, 0, 1)
    assert costs.bytes_of("work", {"states": 10, "logits": 1000}) == 25
    assert costs.bytes_of("other", {"states": 10}) == 0
    assert costs.seconds_of("work", {"flops": 4}) == 2


def test_parts_are_of_the_largest_forward() -> None:
    shape, text = some_work().dense.shape, Text((4, 8, 8), 2)
    parts = parts_of_forward(shape, text)
    assert parts["states"] == 16 * 32 * 4
    assert parts["logits"] == 16 * 96 * 4
    assert parts["attention"] == 4 * 16 * 8 * 4
    assert parts["routed"] == 16 * 3 * (32 + 2 * 16) * 4


def test_what_a_backward_pass_needs_grows_with_the_layers() -> None:
    shape, text = some_work().dense.shape, Text((8, 8), 2)
    early, late = (saved_parts(shape, text, first) for first in (1, 3))
    assert early["saved_states"] == 3 * late["saved_states"]
    assert early["saved_routed"] == 3 * late["saved_routed"]


def test_experts_are_called_once_a_batch() -> None:
    shape = some_work().dense.shape
    assert calls_of(shape, Text((8,) * 8, 4)) == 2 * (1 + 3 * (8 + 1))


def test_what_is_shipped_was_measured() -> None:
    costs = measured_costs()
    assert int(costs.machine["runs"]) > 5
    assert costs.process_bytes > 2**28
    for kind in ("profile", "compress", "finetune", "evaluate_held_out", "measure"):
        assert costs.memory[kind], kind
    for kind in ("profile_32", "forward_32", "finetune"):
        assert costs.seconds[kind]["flops"] > 0, kind
