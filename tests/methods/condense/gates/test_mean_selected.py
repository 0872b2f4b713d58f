"""Gates as means over the tokens that chose the expert."""

from __future__ import annotations

from moe_lab.methods.condense.gates.mean_selected import choose as mean_gates


def test_gates_are_means_over_the_tokens_that_chose_the_expert(searched) -> None:
    _, _, statistics, _, _ = searched
    for layer in statistics.values():
        gates = mean_gates(layer)
        for expert in range(8):
            count = layer["count"][expert]
            expected = layer["gate_sum"][expert] / count if count else 0.0
            assert gates[expert] == expected
