"""MoE-Slimming's closed form against autograd on the strengths of every hidden unit."""

from __future__ import annotations

import pytest
import torch
from expert_sets import Case
from neuron_pairs import EACH_ROUTER, Pair, assert_close, check_permuted, pairs_of, profile_of
from torch import Tensor

from moe_lab.methods.metrics.slimming import Slimming

STRENGTH = 0.9
POSITIONS = [3, 0, 5, 1, 4, 2]  # of the samples of both batches in the calibration set


def by_autograd(case: Case, index: int, pairs: list[Pair]) -> Tensor:
    """[-dL/dalpha]_+ [E, I] of a block's loss over these pairs, all strengths at 0.9."""
    info = case.infos[index]
    alpha_EI = torch.full((info.num_experts, info.expert_width), STRENGTH, dtype=torch.float64)
    alpha_EI.requires_grad_()
    intact, perturbed = {}, {}
    for pair in pairs:
        intact[pair.token] = perturbed[pair.token] = pair.y_D
    for pair in pairs:
        change_I = (alpha_EI[pair.expert] - 1) * pair.a_I
        perturbed[pair.token] = perturbed[pair.token] + pair.weight * change_I @ pair.column_ID
    lost = sum(((perturbed[token] - y_D) ** 2).sum() for token, y_D in intact.items())
    loss = lost / (sum((y_D**2).sum() for y_D in intact.values()) + 1e-6)
    loss.backward()
    return (-alpha_EI.grad).clamp(min=0)


def slow_slimming(case: Case, batch: int, momentum: float) -> dict[int, Tensor]:
    """The moving average over batches of documents in the calibration set's order, normalised."""
    scores = {}
    for index, pairs in pairs_of(case).items():
        average = None
        for first in range(0, len(POSITIONS), batch):
            documents = [d for d, at in enumerate(POSITIONS) if first <= at < first + batch]
            score = by_autograd(case, index, [p for p in pairs if p.document in documents])
            average = score if average is None else momentum * average + (1 - momentum) * score
        scores[index] = average / average.sum()
    return scores


@EACH_ROUTER
@pytest.mark.parametrize("batch", [2, 4, 32])
def test_it_is_autograd(family: str, batch: int) -> None:
    case = Case(family)
    metric = Slimming(batch=batch, momentum=0.7)
    scores = metric.neuron_scores(profile_of(case, POSITIONS))
    assert_close(scores, slow_slimming(case, batch, 0.7), case)
    assert all(abs(float(score.sum()) - 1) < 1e-9 for score in scores)


def test_the_order_of_documents_counts() -> None:
    case, metric = Case("mixtral"), Slimming(batch=2, momentum=0.9)
    one, other = (metric.neuron_scores(profile_of(case, some)) for some in (None, POSITIONS))
    assert not torch.allclose(one[0], other[0], rtol=1e-3)


def test_hidden_units_in_another_order() -> None:
    check_permuted(Case("qwen2_moe"), Slimming())
