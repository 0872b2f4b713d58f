"""Two ranks, each with its share of every expert.

Not with whole experts or layers shared out: there vLLM 0.32 for CPUs ends in a segmentation fault
and in a failed assertion, with a stock Mixtral too.
"""

from __future__ import annotations

from conftest import Serve, assert_right

CASES = ("qwen2_moe-stand_ins", "mixtral-dense", "deepseek_v3-narrow", "qwen3_moe-shared_rows")


def test_two_ranks_say_the_same(serve: Serve) -> None:
    """Also where a layer's hidden units cannot be halved."""
    for answer in serve(*CASES, **{"tensor-parallel-size": 2}).values():
        assert_right(answer)
