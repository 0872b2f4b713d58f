"""What all decodings keep to, by name and with options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from families import tiny_model

from moe_lab.evaluate.decoding.base import (
    Decoder,
    as_decoding,
    decoding_identity,
    decoding_told,
)
from moe_lab.evaluate.decoding.dynamic import Dynamic
from moe_lab.evaluate.decoding.scmoe import SCMoE
from moe_lab.lookup import names_in
from moe_lab.types import LayerInfo, UserError

NAMES = names_in("moe_lab.evaluate.decoding")
SCMOE = "moe_lab.evaluate.decoding.scmoe.SCMoE"


def test_the_decodings_there_are() -> None:
    assert NAMES == ["contrastive", "dynamic", "greedy", "scmoe"]
    model = tiny_model("mixtral")
    for name in NAMES:
        with as_decoding(name).opened(model) as decoder:
            assert isinstance(decoder, Decoder) and decoder.model is model
        assert as_decoding(name).name == name


def test_one_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"eval.decoding='beam' does not exist; there are contrast"):
        as_decoding("beam")
    with pytest.raises(UserError, match="decoding is int, and must be made by a class derived"):
        as_decoding(3)  # type: ignore[arg-type]
    for wrong in (Dynamic(0.0), SCMoE(alpha=0.0), SCMoE(beta=-1.0), SCMoE(weak="last")):
        with pytest.raises(UserError, match=r"^decoding\.\w+="):
            wrong.check([LayerInfo(1, "x", 8, 2, 2)])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("greedy", {"name": "greedy"}),
        ("dynamic", {"name": "dynamic", "threshold": 0.4}),
        ({"_target_": SCMOE, "beta": 0.3, "seed": 7},
         {"name": "scmoe", "alpha": 0.1, "beta": 0.3, "weak": "rank", "rank": 2,
          "strong_top_k": None}),
        ({"_target_": SCMOE, "weak": "random", "seed": 7},
         {"name": "scmoe", "alpha": 0.1, "beta": 0.5, "weak": "random", "seed": 7,
          "strong_top_k": None}),
    ],
)  # fmt: skip
def test_what_results_depend_on(given: str | Mapping[str, Any], expected: dict[str, Any]) -> None:
    assert decoding_identity(given) == expected
    told = {name: value for name, value in expected.items() if value is not None}
    assert decoding_told(given) == {"decoding": told.pop("name")} | told


def test_a_name_is_its_defaults() -> None:
    assert decoding_identity("scmoe") == decoding_identity({"_target_": SCMOE})
    assert decoding_told("none of these") == {"decoding": "none of these"}, "refused later"
