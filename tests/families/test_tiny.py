"""Types by structure, and tiny models of them by guessing."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_lab.families import tiny
from moe_lab.families.references import expert_counts


def test_types_are_those_that_count_experts() -> None:
    types = tiny.model_types()
    assert types["qwen3_moe"] == types["dbrx"] == "AutoModelForCausalLM"
    assert types["qwen3_vl_moe"] == types["llama4"] == "AutoModelForImageTextToText"
    assert types["nllb-moe"] == "AutoModelForSeq2SeqLM"
    assert len(types) >= 80
    assert not {"llama", "bamba", "qwen2_vl", "vitpose"} & types.keys()
    assert "qwen3_vl_moe_text" not in types, "a part that no auto class opens by itself"


def test_a_type_whose_default_config_cannot_be_made_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: object, **values: object) -> None:
        raise ValueError("no defaults")

    monkeypatch.setattr(CONFIG_MAPPING["qwen3_moe"], "__init__", refuse)
    assert "qwen3_moe" in tiny.model_types()


def test_a_new_type_appears_and_is_built_by_itself() -> None:
    class NewConfig(MixtralConfig):
        model_type = "made_up_moe"

    class NewForCausalLM(MixtralForCausalLM):
        config_class = NewConfig

    CONFIG_MAPPING.register("made_up_moe", NewConfig)
    AutoModelForCausalLM.register(NewConfig, NewForCausalLM)
    try:
        assert tiny.model_types()["made_up_moe"] == "AutoModelForCausalLM"
        model = tiny.tiny_model("made_up_moe")
    finally:
        del CONFIG_MAPPING._extra_content["made_up_moe"]
        del AutoModelForCausalLM._model_mapping._extra_content[NewConfig]
    assert type(model) is NewForCausalLM
    assert expert_counts(model) == {0: 8, 1: 8, 2: 8, 3: 8}


def test_every_parameter_is_drawn_and_a_seed_gives_the_same() -> None:
    model, again, other = (tiny.tiny_model("deepseek_v3", seed) for seed in (0, 0, 1))
    for (name, one), same, another in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, same) and not torch.equal(one, another), name
        assert one.unique().numel() > 1, name
    biases = [one for name, one in model.named_buffers() if "correction_bias" in name]
    assert biases and all(bias.unique().numel() == 8 for bias in biases)


def test_lists_by_layer_keep_every_kind() -> None:
    config = tiny.tiny_config("qwen3_next")
    assert len(config.layer_types) == 4
    assert set(config.layer_types) == {"linear_attention", "full_attention"}


def test_what_is_not_tiny_is_refused_before_it_takes_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiny, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"it would have [\d,]+ parameters"):
        tiny.tiny_model("mixtral")


def test_batches_are_padded_text() -> None:
    for batch in tiny.tiny_batches():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert len(set(mask.sum(dim=1).tolist())) > 1
        assert bool((ids[mask == 1] >= 64).all()) and bool((ids[mask == 0] == 0).all())
