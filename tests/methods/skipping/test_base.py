"""What every rule refuses before any work."""

from __future__ import annotations

import dataclasses

import pytest

from moe_lab.methods.skip import Skip
from moe_lab.types import LayerInfo, UserError

FOUR = [LayerInfo(index, f"layers.{index}.mlp", 8, 4, 32, family="qwen2_moe") for index in (1, 2)]
TWO = [dataclasses.replace(info, top_k=2) for info in FOUR]
ONE = [dataclasses.replace(info, top_k=1) for info in FOUR]


@pytest.mark.parametrize(
    ("options", "layers", "why"),
    [
        ({"rule": "naee"}, FOUR, "skips the second of two experts, and this model gives a token 4"),
        ({"rule": "naee", "quantile": 0.3}, TWO, "method.quantile=0.3 is no option of method.rule"),
        ({"rule": "entropy"}, ONE, "gives each token 1 expert, so that none can be left out"),
        ({"rule": "entropy", "min_top_k": 4}, FOUR, "min_top_k=4: .* from 1 to 3"),
        ({"rule": "ratio", "average_top_k": 5.0}, FOUR, "average_top_k=5: .* 4 experts"),
        ({"rule": "ratio", "average_top_k": 2.0, "quantile": 0.5}, FOUR, "give one of them"),
        ({"rule": "top_p"}, FOUR, "give one of method.mass=0.4 .* and method.average_top_k"),
        ({"rule": "top_p", "mass": 0.4, "average_top_k": 2.0}, FOUR, "give one of"),
        ({"rule": "lexi"}, FOUR, "give method.average_top_k, .* from 1 to 4"),
        ({"rule": "lexi", "average_top_k": 2.0, "num_samples": 3}, FOUR, "num_samples is no opt"),
        ({"rule": "lexi", "average_top_k": 2.0, "inputs": "text", "num_inputs": 3}, FOUR, "num_in"),
        ({"rule": "lexi", "average_top_k": 2.0, "damage": "relative"}, FOUR, "inputs=text"),
        ({"rule": "listed"}, FOUR, "top_k=null: .* one number, or one for each of the 2 MoE layer"),
        ({"rule": "listed", "top_k": [2, 2, 2]}, FOUR, "of the 2 MoE layers .1, 2."),
        ({"rule": "listed", "top_k": [2, 5]}, FOUR, "layer 2 .* can choose 1 to 4, not 5"),
        ({"rule": "listed", "top_k": {3: 1}}, FOUR, "names layers that are none: .* .1, 2."),
        ({"rule": "listed", "top_k": {"last": 1}}, FOUR, "{last: 1} names layers that are none"),
        ({"rule": "listed", "top_k": 1, "mass": 0.5}, FOUR, "method.mass=0.5 is no option"),
        ({"rule": "ratio", "quantile": 1.5}, FOUR, "quantile=1.5: it must be from 0 to 1"),
    ],
)
def test_refusals(options: dict, layers: list[LayerInfo], why: str) -> None:
    with pytest.raises(UserError, match=why):
        Skip(**options).check(layers)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"rule": "naee", "num_samples": 8}, TWO),
        ({"rule": "entropy", "min_top_k": 3}, FOUR),
        ({"rule": "lexi", "average_top_k": 4.0}, FOUR),
        ({"rule": "listed", "top_k": {2: 1}}, FOUR),
        ({"rule": "listed", "top_k": 1}, ONE),
        ({"rule": "top_p", "mass": 1.0}, FOUR),
        ({"rule": "ratio"}, FOUR),
    ],
)
def test_what_is_possible(options: dict, layers: list[LayerInfo]) -> None:
    method = Skip(**options)
    method.check(layers)
    assert [edit.index for edit in method.example(layers)] == [1, 2]
