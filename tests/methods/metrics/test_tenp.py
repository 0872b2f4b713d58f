"""TENP against its definition, a token at a time."""

from __future__ import annotations

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

from moe_lab.methods.metrics.tenp import Tenp


def slow_tenp(case: Case) -> dict[int, Tensor]:
    """The mean over an expert's tokens of <a_c w_c, f> / ||f||."""
    scores = {}
    for index, pairs in pairs_of(case).items():
        scores[index] = nothing(case, index)
        for expert in {pair.expert for pair in pairs}:
            own = [pair for pair in pairs if pair.expert == expert]
            for pair in own:
                f_D = pair.f_D.detach()
                for unit, column_D in enumerate(pair.column_ID):
                    along = float(pair.a_I[unit] * column_D @ f_D / f_D.norm())
                    scores[index][expert, unit] += along / len(own)
    return scores


@EACH_ROUTER
def test_it_is_its_definition(family: str) -> None:
    case = Case(family)
    assert_close(Tenp().neuron_scores(profile_of(case)), slow_tenp(case), case)


def test_the_parts_of_an_output_make_it_up() -> None:
    """An expert's scores add up to the mean norm of its output."""
    case = Case("mixtral")
    for layer, score_EI in zip(
        case.statistics, Tenp().neuron_scores(profile_of(case)), strict=True
    ):
        norm_E = layer["norm_sum"] / layer["count"].clamp(min=1)
        assert (score_EI.sum(dim=1) - norm_E).abs().max() < 1e-9


def test_hidden_units_in_another_order() -> None:
    check_permuted(Case("qwen2_moe"), Tenp())


def test_an_expert_without_tokens_has_no_score() -> None:
    for score_EI in Tenp().neuron_scores(profile_of(with_an_unseen_expert())):
        assert (score_EI[UNSEEN] == 0).all() and (score_EI != 0).any()
