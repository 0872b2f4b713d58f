"""Families whose original layout we convert."""

from __future__ import annotations

from moe_lab.models.families import deepseek
from moe_lab.models.families.base import family_of


def test_a_family_is_a_file() -> None:
    assert family_of("deepseek") is deepseek
    assert family_of("qwen2_moe") is None and family_of(None) is None
