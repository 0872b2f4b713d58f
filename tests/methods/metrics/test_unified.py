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
    for powers, asked in (((3, 1), "gate_power=3"), ((1, -1), "norm_power=-1")):
        with pytest.raises(UserError, match=rf"metric\.{asked}: there are 0, 1, 2"):
            Unified(True, *powers).check([TWO])
    with pytest.raises(UserError, match=r"mean of 1.*metric\.mean=false"):
        Unified(True, 0, 0).check([TWO])
