"""Two ranks: each with its share of every expert, of the experts, or of the layers."""

from __future__ import annotations

import pytest
from conftest import Serve, assert_right

CASES = ("qwen2_moe-stand_ins", "mixtral-dense", "deepseek_v3-narrow", "qwen3_moe-shared_rows")


@pytest.mark.parametrize(
    "options",
    [
        {"tensor-parallel-size": 2},
        {"tensor-parallel-size": 2, "enable-expert-parallel": True},
        {"pipeline-parallel-size": 2},
    ],
    ids=["tensor", "expert", "pipeline"],
)
def test_two_ranks_say_the_same(serve: Serve, options: dict[str, object]) -> None:
    """Also where a layer's hidden units cannot be halved."""
    for answer in serve(*CASES, **options).values():
        assert_right(answer)
