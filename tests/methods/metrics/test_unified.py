"""The unified family of criteria: what it refuses."""

from __future__ import annotations

import pytest
from criteria import UNIFIED
from layer_statistics import TWO

from moe_lab.methods.metrics.unified import Unified
from moe_lab.types import UserError


def test_unified_refuses_what_is_not_collected() -> None:
    for metric in UNIFIED.values():
        metric.check([TWO])
    for powers in ((3, 1), (1, -1)):
        with pytest.raises(UserError, match=r"metric\.gate_power=.*each can be 0, 1 or 2"):
            Unified(True, *powers).check([TWO])
    with pytest.raises(UserError, match=r"mean of 1.*metric\.mean=false"):
        Unified(True, 0, 0).check([TWO])
