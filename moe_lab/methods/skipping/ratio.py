"""Experts whose weight is small beside the token's heaviest are skipped: NAEE's rule for any top-k.

Ours beyond two experts per token, where the paper has none: each of them is held against the
heaviest, with one threshold for each layer.
"""

from __future__ import annotations

from moe_lab.methods.skipping.by_weight import ByWeight


class Ratio(ByWeight):
    """Skip the experts j with g_j < beta g_1, beta the layer's quantile of g_j / g_1."""

    kind = "ratio"
    told = "experts with g_j < value * g_1 are skipped"
