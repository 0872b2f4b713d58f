"""What a saved config says for engines, against what transformers' own code computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_models import condense, edited, in_fresh_process, moe_indices, prune
from families import FAMILIES, tiny_model
from transformers import AutoConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer

from moe_lab.families.tiny import model_types, tiny_config
from moe_lab.families.tiny import tiny_model as tiny_of
from moe_lab.models.checkpoint import load
from moe_lab.models.engine_config import READ_BY_ENGINES, complete_config
from moe_lab.models.layers import COUNT_FIELDS, moe_layers
from moe_lab.models.opening import empty_model, text_config
from moe_lab.models.saving import save_checkpoint


def values_of(folder: Path) -> dict:
    values: dict = json.loads((folder / "config.json").read_text())
    return values


def completed(family: str, **changes: object) -> dict:
    """The JSON object that is written of a type's tiny config."""
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    values: dict = json.loads(config.to_json_string(use_diff=False))
    complete_config(values, config)
    return values


def test_a_prune_of_each_family_says_its_count_by_all_names(tmp_path: Path) -> None:
    folders = [tmp_path / family for family in FAMILIES]
    for folder in folders:
        edits = [prune(i, [0, 1, 4, 5]) for i in moe_indices(folder.name)]
        assert edited(folder.name, edits, folder)
        values = values_of(folder / "model")
        counts = {name: values[name] for name in COUNT_FIELDS if name in values}
        assert set(counts.values()) == {4}
        config = AutoConfig.from_pretrained(folder / "model")
        assert counts.keys() == {name for name in COUNT_FIELDS if hasattr(config, name)}
    differences = in_fresh_process("stock", folders)
    assert differences.keys() == FAMILIES.keys() and max(differences.values()) < 1e-5


def test_counts_have_both_spellings() -> None:
    assert {"num_experts", "num_local_experts"} <= completed("qwen3_moe").keys()
    assert {"num_experts", "num_local_experts"} <= completed("mixtral").keys()
    assert {"num_experts", "moe_num_experts"} <= completed("ernie4_5_moe").keys()


@pytest.mark.parametrize("family", READ_BY_ENGINES)
def test_fields_for_engines_change_nothing_in_transformers(family: str, tmp_path: Path) -> None:
    """Written where they lack, kept where they are, and read back as the same config."""

    def read(values: dict) -> dict:
        (tmp_path / "config.json").write_text(json.dumps(values))
        found: dict = AutoConfig.from_pretrained(tmp_path).to_dict()
        found["rope_parameters"] = {"partial_rotary_factor": 1.0} | found["rope_parameters"]
        return found

    without = json.loads(tiny_config(family).to_json_string(use_diff=False))
    fields = READ_BY_ENGINES[family].keys()
    assert fields.isdisjoint(without)
    before, after = read(without), read(completed(family))
    assert fields <= after.keys()
    assert {name: after[name] for name in before} == before
    field = next(iter(fields))
    assert completed(family, **{field: "as the source"})[field] == "as the source"


SIGMOIDS = [
    name
    for name, fields in READ_BY_ENGINES.items()
    if "sigmoid" in {fields.get("scoring_func"), fields.get("score_func")}
]


@pytest.mark.parametrize("family", SIGMOIDS)
def test_a_router_that_is_said_to_be_a_sigmoid_with_a_bias_is_one(family: str) -> None:
    """Weights are the sigmoids of the chosen up to one factor, and the bias decides the choice."""
    model = tiny_of(family)
    layer = moe_layers(model)[0]
    seen: list = []
    hook = layer.router.register_forward_hook(lambda _, __, output: seen.append(output))
    biases = [
        buffer for name, buffer in layer.block.named_buffers() if name.endswith(("bias",))
    ] + [p for name, p in layer.block.named_parameters() if name.endswith("expert_bias")]
    assert len(biases) == 1
    with torch.no_grad():
        ids = torch.arange(10, 40)[None]
        model(input_ids=ids)
        biases[0].copy_(torch.linspace(0, 9, 8))  # no logit outweighs it
        model(input_ids=ids)
    hook.remove()
    (logits_TE, weights_TK, indices_TK), (_, _, forced_TK) = seen
    share_TK = logits_TE.float().sigmoid().gather(1, indices_TK)
    ratio_TK = weights_TK / share_TK
    assert torch.allclose(ratio_TK, ratio_TK[:, :1].expand_as(ratio_TK), rtol=1e-4)
    assert set(forced_TK.unique().tolist()) <= {4, 5, 6, 7}
    assert set(indices_TK.unique().tolist()) != set(forced_TK.unique().tolist())


@pytest.mark.parametrize("family", ["glm4_moe_lite", "exaone_moe", "hy_v3", "deepseek_v32"])
def test_leading_dense_layers_are_counted(family: str) -> None:
    def counted(*types: str) -> int:
        number: int = completed(family, mlp_layer_types=list(types))["first_k_dense_replace"]
        return number

    dense, sparse = "dense", "sparse"
    assert counted(dense, dense, sparse, sparse) == 2
    assert counted(sparse, dense, sparse, sparse) == 0  # refused, not served without experts
    assert counted(dense, sparse, dense, sparse) == 1


def test_the_source_s_own_ways_to_list_dense_layers_follow() -> None:
    types = ["dense", "dense", "sparse", "sparse"]
    assert completed("mimo_v2_flash", mlp_layer_types=types)["moe_layer_freq"] == [0, 0, 1, 1]
    stale = {"mlp_layer_types": types, "first_k_dense_replace": 1}
    made = completed("laguna", **stale, moe_layer_freq=[0, 1, 1, 1])
    assert made["first_k_dense_replace"] == 2 and made["moe_layer_freq"] == [0, 0, 1, 1]
    every_second = ["dense", "sparse", "dense", "sparse"]
    made = completed("glm4_moe_lite", mlp_layer_types=every_second, moe_layer_freq=2)
    assert (made["first_k_dense_replace"], made["moe_layer_freq"]) == (1, 1)
    assert "first_k_dense_replace" not in completed("laguna")


def test_a_model_as_another_family_counts_its_leading_dense_layers(tmp_path: Path) -> None:
    assert edited("deepseek_v3", [condense(2, [2])], tmp_path / "x", convert="superset")
    values = values_of(tmp_path / "x" / "model")
    assert values["model_type"] == "glm4_moe_lite"
    assert values["mlp_layer_types"] == ["dense", "sparse", "dense", "sparse"]
    assert values["first_k_dense_replace"] == 1


def counts_by_layer(config: object) -> list[int]:
    return [layer.info.num_experts for layer in moe_layers(empty_model(config))]


def reading_counts_per_layer(families: Iterable[str]) -> list[str]:
    """Model types that build another number of experts where `per_layer_config` says so."""
    found = []
    for family in families:
        try:
            config = tiny_config(family)
            before = counts_by_layer(copy.deepcopy(config))
            text = text_config(config)
            field = next(name for name in COUNT_FIELDS if name in vars(text))
            given = {
                int(i): one for i, one in (text.to_dict().get("per_layer_config") or {}).items()
            }
            last = moe_index(config)
            given[last] = given.get(last, {}) | {field: getattr(text, field) - 2}
            text.allow_global_per_layer_attribute_access = True
            text.per_layer_config = given
            after = counts_by_layer(config)
        except Exception:  # noqa: BLE001  # whatever refuses it does not read it
            continue
        if before != after:
            found.append(family)
    return found


def test_no_text_model_takes_its_experts_from_per_layer_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that it cannot say unequal layers: the alarm for a transformers in which it can."""
    assert reading_counts_per_layer(model_types()) == []
    stock = Qwen2MoeDecoderLayer.__init__

    def reading(self: Any, config: Any, index: int) -> None:
        stock(self, config.per_layer_config[index], index)

    monkeypatch.setattr(Qwen2MoeDecoderLayer, "__init__", reading)
    assert reading_counts_per_layer(["qwen2_moe", "mixtral"]) == ["qwen2_moe"]


def moe_index(config: object) -> int:
    return moe_layers(empty_model(copy.deepcopy(config)))[-1].info.index


def test_a_deepseek_v3_of_transformers_says_its_router(tmp_path: Path) -> None:
    """Of the config of a checkpoint, on disk: the source has neither field."""
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "source")
    assert not {"scoring_func", "topk_method"} & values_of(tmp_path / "source").keys()
    save_checkpoint(model, tmp_path / "out", tmp_path / "source")
    values = values_of(tmp_path / "out")
    assert values["scoring_func"] == "sigmoid" and values["topk_method"] == "noaux_tc"
    assert load(tmp_path / "out").config.scoring_func == "sigmoid"
