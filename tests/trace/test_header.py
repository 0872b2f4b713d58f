"""What a trace says of itself."""

from __future__ import annotations

import json

import pytest
from families import tiny_model
from traced import header

from moe_lab.trace.header import TracedLayer, TraceHeader, widest_bytes
from moe_lab.types import UserError

MIXTRAL = TracedLayer(0, 8, 2, False, 3 * 4096 * 14336, 2 * 3 * 4096 * 14336)


def test_the_bytes_of_an_expert_by_precision() -> None:
    assert MIXTRAL.bytes_at(None) == MIXTRAL.bytes_at(16) == 2 * 176_160_768
    scales = 2 * 176_160_768 // 128
    assert MIXTRAL.bytes_at(8) == 176_160_768 + scales
    assert MIXTRAL.bytes_at(4) == 176_160_768 // 2 + scales
    assert MIXTRAL.bytes_at(3) == 176_160_768 * 3 // 8 + scales
    odd = TracedLayer(1, 8, 2, False, 129, 4 * 129)
    assert odd.bytes_at(4) == 65 + 2 * 2 and odd.bytes_at(None) == 516
    assert widest_bytes([odd, MIXTRAL], 8) == MIXTRAL.bytes_at(8)


def test_it_is_read_as_it_is_written() -> None:
    one = header(tiny_model("deepseek_v3"))
    assert TraceHeader.from_json(json.loads(json.dumps(one.to_json()))) == one
    told = one.to_json()["layers"][0]
    assert told["expert_bytes"]["16"] == 2 * 3 * 32 * 16 and set(told["expert_bytes"]) == {
        "16", "8", "4", "3", "2"
    }  # fmt: skip
    assert one.num_experts == 8 and one.experts_bytes() == 3 * 8 * 4 * 3 * 32 * 16


def test_a_header_that_lacks_something_is_refused() -> None:
    values = header(tiny_model("mixtral")).to_json()
    with pytest.raises(UserError, match="format None"):
        TraceHeader.from_json({})
    with pytest.raises(UserError, match="lacks what a trace says of itself: 'family'"):
        TraceHeader.from_json({key: value for key, value in values.items() if key != "family"})
