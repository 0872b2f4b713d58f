"""What is refused before any work, because parts of a run do not go together."""

from __future__ import annotations

import functools

import pytest

from moe_lab.compute import Compute
from moe_lab.methods.merge import Merge
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.none import Nothing
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.stages.checks import check_profile
from moe_lab.types import UserError


def test_metrics_that_need_more_than_the_routers_are_refused() -> None:
    routers = Compute("cpu", profile="routers")
    for method in (Prune(functools.partial(frequency), Uniform(0.25)), Nothing()):
        check_profile(routers, method)
    for method in (Prune(functools.partial(reap), Uniform(0.25)), Merge(1, 4)):
        check_profile(Compute("cpu"), method)
        with pytest.raises(UserError, match=r"aimer, frequency, .*soft_count.*compute.profile=all"):
            check_profile(routers, method)
    for wrong in ({"profile": "some"}, {"layerwise": "sometimes"}):
        with pytest.raises(UserError, match="there are"):
            Compute("cpu", **wrong).start()
