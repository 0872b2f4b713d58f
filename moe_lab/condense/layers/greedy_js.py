"""CD-MoE's layer search: forward selection by the divergence of the last hidden state."""

from __future__ import annotations

from moe_lab.condense import Choice, PartlyCondensed
from moe_lab.progress import progress


def choose(model: PartlyCondensed, num_layers: int) -> Choice:
    """Condense, `num_layers` times, the layer that moves the last hidden state least.

    CD-MoE (2412.00069): after the experts of every layer are fixed,
    P <- P + argmin_l JS(H, H^(P+l)) with H the last hidden state after the final norm; beam 1.
    Ties go to the lower layer. A candidate runs only the decoder layers from itself on.
    """
    order: list[int] = []
    divergence: list[float] = []
    for _ in progress(range(num_layers), "condense: choosing layers"):
        rest = [index for index in sorted(model.blocks) if index not in order]
        values = [model.divergence_with(index) for index in rest]
        best = min(range(len(rest)), key=values.__getitem__)
        order.append(rest[best])
        divergence.append(values[best])
        model.choose(rest[best])
    return Choice(tuple(order), tuple(divergence))
