"""A model's structure as stated, and configs that differ from it."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from moe_lab.models.architecture import config_of, differences
from moe_lab.types import UserError

MIXTRAL = {"model_type": "mixtral", "hidden_size": 64, "num_local_experts": 8}
WRAPPED = {
    "model_type": "qwen3_5_moe",
    "text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 8, "num_hidden_layers": 8},
}


def test_the_same_structure_has_no_differences() -> None:
    assert differences(AutoConfig.for_model(**MIXTRAL), MIXTRAL) == []
    assert differences(AutoConfig.for_model(**WRAPPED), WRAPPED) == []


def test_fields_that_are_not_stated_may_be_any() -> None:
    assert differences(AutoConfig.for_model(**MIXTRAL, num_hidden_layers=3), MIXTRAL) == []


def test_each_difference_is_told_with_both_values() -> None:
    other = AutoConfig.for_model(**MIXTRAL | {"num_local_experts": 6, "hidden_size": 32})
    assert differences(other, MIXTRAL) == [
        "hidden_size 32 (not 64)",
        "num_local_experts 6 (not 8)",
    ]


def test_nested_fields_are_told_with_their_path() -> None:
    text = WRAPPED["text_config"] | {"num_experts": 4}
    other = AutoConfig.for_model(**WRAPPED | {"text_config": text})
    assert differences(other, WRAPPED) == ["text_config.num_experts 4 (not 8)"]


def test_of_another_family_only_that_is_told() -> None:
    other = AutoConfig.for_model("olmoe", num_experts=4)
    assert differences(other, MIXTRAL) == ["model_type olmoe (not mixtral)"]
    of_text = AutoConfig.for_model("qwen3_5_moe_text")
    assert differences(of_text, WRAPPED) == ["model_type qwen3_5_moe_text (not qwen3_5_moe)"]


def test_long_lists_are_told_shortly() -> None:
    stated = {"model_type": "qwen2_moe", "mlp_only_layers": [0, 1, 2, 3, 4]}
    other = AutoConfig.for_model("qwen2_moe", mlp_only_layers=[])
    assert differences(other, stated) == ["mlp_only_layers [] (not [0, … 5 of them])"]


@pytest.mark.parametrize("wrong", [{"model_type": "no_such"}, {"hidden_size": 3}])
def test_what_is_no_config_is_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=r"model\.architecture=null"):
        config_of(wrong)
