"""Which layers a method works on: by an order, or named; and as many as a plan will have."""

from __future__ import annotations

import pytest
import torch

from moe_lab.methods.layer_choice import check_layers, choose_layers, example_layers
from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo, UserError

INFOS = [LayerInfo(i, f"model.layers.{i}.mlp", 8, 2, 32) for i in (1, 2, 3)]


def measured(*cosines: float) -> list[LayerStatistics]:
    return [
        LayerStatistics(info, {"layer_cosine_sum": torch.tensor([2 * one]),
                               "tokens": torch.tensor([2.0])})
        for info, one in zip(INFOS, cosines, strict=True)
    ]  # fmt: skip


def test_an_order_is_followed_as_far_as_asked() -> None:
    statistics = measured(0.5, 0.9, 0.9)

    def chosen(layers: object, number: int = 2) -> tuple[int, ...]:
        return choose_layers(layers, number, statistics, "layer", seed=1)

    assert chosen("cosine") == (2, 3) and chosen("cosine", 3) == (2, 3, 1)
    assert chosen("first") == (1, 2) and chosen("last") == (3, 2)
    assert chosen("all", 1) == (1, 2, 3) and chosen([3, 1], 1) == (3, 1)
    assert chosen("random") == chosen("random") and set(chosen("random", 3)) == {1, 2, 3}


def test_as_many_are_foreseen_as_will_be_chosen() -> None:
    assert [info.index for info in example_layers("cosine", 2, INFOS)] == [2, 3]
    assert [info.index for info in example_layers([3, 1], 1, INFOS)] == [1, 3]


@pytest.mark.parametrize(
    ("layers", "number", "words"),
    [
        ("best", 1, "method.layers='best' does not exist for method=merge; there are all, cosine"),
        ("cosine", 4, "condense.num_layers=4: the model has 3 MoE layers"),
        ([], 1, r"method.layers=\[\]: name one or more, each once"),
        ([1, 1], 1, "each once"),
        ([1, 7], 1, r"names \[7\], but the model's MoE layers are \[1, 2, 3\]"),
    ],
)
def test_what_the_model_has_not_is_refused(layers: object, number: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_layers("merge", layers, number, ["all", "cosine"], INFOS)
    check_layers("merge", "all", 9, ["all", "cosine"], INFOS)
