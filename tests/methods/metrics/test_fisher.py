"""Fisher-MoE against the gradients at masks on every hidden unit."""

from __future__ import annotations

import torch
from expert_sets import Case
from neuron_pairs import EACH_ROUTER, assert_close, check_permuted, nothing, pairs_of, profile_of
from torch import Tensor

from moe_lab.methods.metrics.fisher import Fisher


def slow_fisher(case: Case, over: str) -> dict[int, Tensor]:
    """The squares of a unit's activation times the loss's gradient there, summed before or not."""
    scores = {}
    for index, pairs in pairs_of(case).items():
        scores[index] = nothing(case, index)
        sums: dict[tuple[int, int], Tensor] = {}
        for place, pair in enumerate(pairs):
            key = pair.expert, pair.document if over == "documents" else place
            sums[key] = sums.get(key, 0) + pair.a_I * pair.part_I
        for (expert, _), sum_I in sums.items():
            scores[index][expert] += sum_I**2
    return scores


@EACH_ROUTER
def test_it_is_its_definition(family: str) -> None:
    case = Case(family)
    for over in ("documents", "tokens"):
        scores = Fisher(over=over).neuron_scores(profile_of(case))
        assert_close(scores, slow_fisher(case, over), case)


def test_hidden_units_in_another_order() -> None:
    check_permuted(Case("qwen2_moe"), Fisher())


def test_documents_and_tokens_differ() -> None:
    profile = profile_of(Case("mixtral"))
    by_document, by_token = (
        Fisher(over=over).neuron_scores(profile)[0] for over in ("documents", "tokens")
    )
    assert not torch.allclose(by_document, by_token, rtol=0.1)
    assert Fisher().widths == "by_layer"
