"""What a trace tells in a few figures: how well experts are predicted, how many a request needs."""

from __future__ import annotations

import numpy as np

from moe_lab.trace.file import AHEAD_COLUMN, Trace
from moe_lab.trace.matrices import request_matrices
from moe_lab.trace.recorder import NO_EXPERT


def trace_figures(trace: Trace) -> dict[str, float]:
    """Flat figures of a trace.

    tokens: whose routing it holds; distinct_experts: share of all experts that a request was sent
    to, mean over requests; ahead_<n>_top_1: how often the expert that a layer's input predicts as
    the heaviest n MoE layers ahead is that; ahead_<n>_top_k: the share of the experts n layers
    ahead that were predicted. Absent where nothing was predicted.
    """
    figures: dict[str, float] = {
        "tokens": len(trace.by_layer()[0]),
        "distinct_experts": float(distinct_shares(trace).mean()),
    }
    for distance in range(1, trace.header.lookahead + 1):
        if found := prediction_accuracy(trace, distance):
            figures[f"ahead_{distance}_top_1"], figures[f"ahead_{distance}_top_k"] = found
    return figures


def distinct_shares(trace: Trace) -> np.ndarray:
    """Of each request, the share of all experts that at least one of its tokens was sent to."""
    used = (request_matrices(trace) > 0).sum(axis=(1, 2))
    shares: np.ndarray = used / sum(layer.experts for layer in trace.header.layers)
    return shares


def prediction_accuracy(trace: Trace, distance: int) -> tuple[float, float] | None:
    """Of predictions so many MoE layers ahead: how often the first is right, and the share found.

    Both are means over tokens and layers for which there is a prediction. Of a pair of layers in
    which a token has no expert with weights, nothing is told.
    """
    experts = trace.lists("experts").padded(NO_EXPERT)
    predicted = trace.lists(AHEAD_COLUMN.format(distance)).padded(NO_EXPERT)
    layers, first, shares = trace.by_layer(), [], []
    for rows, targets in zip(layers, layers[distance:], strict=False):
        actual_TK, asked_TK = experts[targets], predicted[rows]
        if asked_TK.shape[1] == 0 or not (asked_TK != NO_EXPERT).any():
            continue
        there_TK = actual_TK != NO_EXPERT
        some = there_TK.any(axis=1)
        found_TK = (actual_TK[:, :, None] == asked_TK[:, None, :]).any(axis=2) & there_TK
        first.append((actual_TK[:, 0] == asked_TK[:, 0])[some])
        shares.append(found_TK.sum(axis=1)[some] / there_TK.sum(axis=1)[some])
    if not first:
        return None
    return float(np.concatenate(first).mean()), float(np.concatenate(shares).mean())
