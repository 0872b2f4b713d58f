"""Experts whose weight itself is small are skipped: ours, for families that do not renormalise.

There a token whose routing is flat has small weights, which add little to its state; held against
the heaviest of them (`ratio`) it would keep all.
"""

from __future__ import annotations

from moe_lab.methods.skipping.by_weight import ByWeight


class Weight(ByWeight):
    """Skip the experts j > 1 with g_j below the layer's quantile of all such g_j."""

    kind = "weight"
    told = "experts with g_j < value are skipped, but for the heaviest"
