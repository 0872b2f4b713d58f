"""All criteria that one layer's statistics are enough for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_lab.methods.metrics.aimer import aimer
from moe_lab.methods.metrics.ean import ean
from moe_lab.methods.metrics.ean_mean import ean_mean
from moe_lab.methods.metrics.easy_ep import easy_ep
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.gate_sum import gate_sum
from moe_lab.methods.metrics.l1 import l1
from moe_lab.methods.metrics.man import man
from moe_lab.methods.metrics.max_activation import max_activation
from moe_lab.methods.metrics.mone import mone
from moe_lab.methods.metrics.msan import msan
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.router_norm import router_norm
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.metrics.unified import Unified
from moe_lab.methods.metrics.weighted_ean import weighted_ean
from moe_lab.profile.layer import LayerStatistics

UNIFIED = {
    f"unified {mean} {gate_power} {norm_power}": Unified(mean, gate_power, norm_power)
    for mean in (False, True)
    for gate_power in (0, 1, 2)
    for norm_power in (0, 1, 2)
    if not mean or gate_power or norm_power
}
OF_ROUTERS = {
    "frequency": frequency,
    "soft_count": soft_count,
    "gate_sum": gate_sum,
    "router_norm": router_norm,
    "aimer": aimer,
    "l1": l1,
    **{name: metric for name, metric in UNIFIED.items() if name.endswith(" 0")},
}
CRITERIA: dict[str, Callable[[LayerStatistics], Tensor]] = {
    **OF_ROUTERS,
    "ean": ean,
    "ean_mean": ean_mean,
    "weighted_ean": weighted_ean,
    "reap": reap,
    "man": man,
    "msan": msan,
    "mone": mone,
    "easy_ep": easy_ep,
    "max_activation": max_activation,
    **UNIFIED,
}
