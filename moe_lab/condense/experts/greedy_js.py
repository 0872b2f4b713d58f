"""CD-MoE's expert search: forward selection by the divergence of the layer's output."""

from __future__ import annotations

from moe_lab.condense import Choice, OpenLayer


def choose(layer: OpenLayer, num_routed: int) -> Choice:
    """Add, `num_routed` times, the expert that brings the layer's output closest to the intact one.

    CD-MoE (2412.00069): S <- S + argmin_i JS(h, h^(S+i)), h the output of the decoder layer (after
    the final norm for the last one), all other layers intact. Every expert's output is computed
    once; a candidate costs one addition and one divergence. Ties go to the lower expert. An expert
    that no calibration token was routed to has no mean gate: it is chosen only when others run out.
    """
    hidden = layer.base_TD
    experts: list[int] = []
    divergence = [layer.divergence(hidden)]
    for _ in range(num_routed):
        rest = [i for i in range(len(layer.gates_E)) if i not in experts]
        rest = [i for i in rest if layer.gates_E[i] != 0] or rest
        values = layer.divergences(hidden, rest)
        best = min(range(len(rest)), key=values.__getitem__)
        experts.append(rest[best])
        divergence.append(values[best])
        hidden = layer.add(hidden, rest[best])
    return Choice(tuple(experts), tuple(divergence))
