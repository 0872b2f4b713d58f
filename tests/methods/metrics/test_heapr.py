"""HEAPr against its definition, with the matrix of gradients that is never made."""

from __future__ import annotations

import pytest
import torch
from expert_sets import Case
from neuron_pairs import (
    EACH_ROUTER,
    UNSEEN,
    assert_close,
    check_permuted,
    nothing,
    pairs_of,
    profile_of,
    with_an_unseen_expert,
)
from torch import Tensor

from moe_lab.methods.metrics.heapr import Heapr
from moe_lab.models.layers import moe_layers


def slow_heapr(case: Case) -> dict[int, Tensor]:
    """(sum_t a_tc^2 / n_e) (w_c^T M_e w_c), M_e = sum_t u_t u_t^T / n_e; -1 without tokens."""
    scores = {}
    for index, pairs in pairs_of(case).items():
        scores[index] = nothing(case, index) - 1
        for expert in {pair.expert for pair in pairs}:
            own = [pair for pair in pairs if pair.expert == expert]
            matrix_DD = sum(torch.outer(one.f_D.grad, one.f_D.grad) for one in own) / len(own)
            square_I = sum(one.a_I**2 for one in own) / len(own)
            for unit, column_D in enumerate(own[0].column_ID):
                scores[index][expert, unit] = square_I[unit] * (column_D @ matrix_DD @ column_D)
    return scores


@EACH_ROUTER
def test_it_is_its_definition(family: str) -> None:
    case = Case(family)
    assert_close(Heapr().neuron_scores(profile_of(case)), slow_heapr(case), case)


def test_an_expert_without_tokens_comes_last() -> None:
    case = with_an_unseen_expert()
    scores = Heapr().neuron_scores(profile_of(case))
    assert_close(scores, slow_heapr(case), case)
    for score_EI in scores:
        assert (score_EI[UNSEEN] == -1).all() and (score_EI >= -1).all()


def test_hidden_units_in_another_order() -> None:
    check_permuted(Case("qwen2_moe"), Heapr())


def test_a_hidden_unit_that_reaches_nothing_is_worth_nothing() -> None:
    case = Case("mixtral")
    moe_layers(case.model)[1].experts.down_proj.data[3, :, 7] = 0
    scores = Heapr().neuron_scores(profile_of(case))
    assert scores[1][3, 7] == 0 < scores[1][3].max()


def test_sampled_labels_converge_to_the_expectation() -> None:
    """More draws, nearer to the score of very many: in the mean over hidden units."""
    case = Case("mixtral")

    def scores(samples: int, seed: int) -> Tensor:
        metric = Heapr(labels="sampled", samples=samples, seed=seed)
        return torch.stack(metric.neuron_scores(profile_of(case)))

    limit = scores(64, seed=9)
    errors = [float((scores(number, 1) / limit - 1).abs().mean()) for number in (1, 16)]
    assert errors[1] < errors[0] / 2
    assert torch.equal(scores(2, seed=1), scores(2, seed=1))


def test_options_that_decide_nothing_are_not_in_its_identity() -> None:
    options = {"labels": "text", "samples": 4, "seed": 0, "num_samples": None}
    assert Heapr().identity(options) == {"labels": "text", "num_samples": None}
    assert Heapr(labels="sampled").identity(options) == options


@pytest.mark.parametrize("name", ["by_expert"])
def test_its_ranking_is_over_all_experts(name: str) -> None:
    assert Heapr().widths == name and Heapr().units == ("neurons",)
