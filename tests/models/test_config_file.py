"""What a config.json of others can say, and no model can mean: one message with file and field."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_folders import EXPERTS, KINDS, config, copied, refusal, set_config, write_intact

from moe_lab.models.config_file import check_values, unheeded
from moe_lab.models.stored import Stored
from moe_lab.types import UserError

NAN, INF = float("nan"), float("inf")
# Of every family: a field, values that it cannot have, and what else the message may name.
EVERYWHERE: dict[str, list[Any]] = {
    EXPERTS: ["8", -1, 0, 10**9, 7, True, [8]],
    "num_experts_per_tok": [9, 0, -2, "2", 10**9],
    "hidden_size": [0, 33, -32, "32", 64, 2**70],
    "num_hidden_layers": [0, -1, 10**9, 5, "4", 4.5],
    "vocab_size": [10, 0, 10**6, "a", -5],
    "rms_norm_eps": [NAN, -1.0, "1e-6", INF, 1e30],
    "num_attention_heads": [0, -4, 10**9],
    "max_position_embeddings": [0, -1, "512", 10**12],
    "dtype": ["float37", 5, "int8", ["float32"]],
    "pad_token_id": [10**6, "a"],
    "initializer_range": ["x", NAN],
    "attention_dropout": [2.0, "x", -1],
    "tie_word_embeddings": ["false"],
    "architectures": ["MixtralForCausalLM", [5], {"a": 1}],
    "rope_parameters": [{"rope_type": "nonsense", "rope_theta": 1e4}, "x"],
}
# Of one family each: the fields that it has.
SOME: dict[str, dict[str, list[Any]]] = {
    "mixtral": {
        "hidden_act": ["nonsense", 3],
        "rope_theta": ["x", 0, NAN, -10000.0],
        "rope_scaling": ["linear", [1], {"rope_type": "nonsense"}, {"rope_type": "yarn"},
                         {"rope_type": "linear", "factor": -2.0}],
        "head_dim": [7, -8, "8", 16],
        "num_key_value_heads": [0, 3, 8],
        "intermediate_size": [-16, 0, 17, "16"],
        "sliding_window": [-1, "x"],
        "id2label": ["x"],
        "use_cache": ["x"],
        "per_layer_config": ["x", {"0": {"hidden_size": 3}}],
        "output_router_logits": ["x"],
        "text_config": [[], "x"],
        "moe_lab": [5, {"version": 2}, {"layers": {"1": {"width": -3}}},
                    {"layers": {"1": {"x": 1}}}],
    },
    "qwen2_moe": {
        "hidden_act": ["nonsense", "gelu_or_so"],
        "layer_types": [["full_attention"], ["nonsense"] * 4, "x", [1, 2, 3, 4]],
        "mlp_only_layers": [["a"], [99], [-1], "0"],
        "moe_intermediate_size": [-1, 15, None],
        "shared_expert_intermediate_size": [12, "24"],
        "decoder_sparse_step": [0, -1],
        "norm_topk_prob": ["true", 7],
    },
    "deepseek_v3": {
        "n_group": [3, 0, "2"],
        "topk_group": [5, -1],
        "first_k_dense_replace": [100, 2, "1"],
        "routed_scaling_factor": ["x", NAN],
        "kv_lora_rank": [0, 17],
        "q_lora_rank": [16],
        "qk_rope_head_dim": [7, 0],
        "head_dim": [16],
        "v_head_dim": [4],
        "n_shared_experts": [2, -1],
    },
    "gpt_oss": {"layer_types": [["full_attention"]], "attention_bias": [False, "no"]},
    "qwen3_vl_moe": {"text_config": [None, [], "x"], "vision_config": [[], "x"]},
}  # fmt: skip
CASES = [
    *((kind, name, v) for kind in KINDS for name, values in EVERYWHERE.items() for v in values),
    *((kind, name, v) for kind, f in SOME.items() for name, vs in f.items() for v in vs),
]
# A size that the files do not bear out is told by a tensor and two shapes.
SHAPES = ("asks for [", "lacks ", "do not fit together", "does not know there", "decoder layer")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    for kind in KINDS:
        write_intact(kind, folder / kind, tokenizer)
        assert refusal(folder / kind) is None
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_cannot_be_is_told_with_file_and_field(
    kind: str, intact: Path, tmp_path: Path
) -> None:
    wrong = []
    for _, name, value in (case for case in CASES if case[0] == kind):
        folder, began = copied(intact / kind, tmp_path / "broken"), time.perf_counter()
        if name in ("text_config", "vision_config"):
            (folder / "config.json").write_text(json.dumps(config(folder) | {name: value}))
        else:
            set_config(folder, {name: value})
        told = refusal(folder)
        known = told and (
            name in told
            or (name.startswith("rope_") and "rope_" in told)
            or (name == EXPERTS and "experts" in told)
            or any(words in told for words in SHAPES)
        )
        if not known or str(folder) not in told or "\n" in told or len(told) > 1000:
            wrong.append(f"{name}={value!r}: {told}")
        if time.perf_counter() - began > 5:
            wrong.append(f"{name}={value!r}: took {time.perf_counter() - began:.1f} s")
    assert "\n".join(wrong) == ""


NO_CONFIG = {
    "": "cannot be read",
    "[]": "holds no object",
    "null": "holds no object",
    "{": "cannot be read",
    "not JSON": "cannot be read",
    "\ufeff{}": "cannot be read",
    "{}": "no model_type",
    '{"model_type": 5}': "model_type=5",
    '{"model_type": ""}': "model_type=''",
    '{"model_type": ["mixtral"]}': "model_type=",
    '{"model_type": "nonsense"}': "'nonsense', which this version of transformers does not know",
    '{"model_type": "nonsense", "auto_map": {"AutoModel": "x.Y"}}': "is never run here",
    '{"model_type": "t5"}': "t5",
    '{"model_type": "bert"}': "bert",
    '{"model_type": "llama"}': "config.json asks for [32000, 4096]",
    '{"model_type": "moe_lab"}': "no family's config stands",
    '{"model_type": "moe_lab", "moe_lab": {"version": 2, "config": 5}}': "no family's config",
    "[" * 100_000: "cannot be read",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", NO_CONFIG, ids=lambda text: text[:60])
def test_a_file_that_is_no_config(text: str, intact: Path, tmp_path: Path) -> None:
    folder = copied(intact / "mixtral", tmp_path / "broken")
    (folder / "config.json").write_text(text)
    told = refusal(folder)
    assert told and NO_CONFIG[text] in told and str(folder) in told


CODE: dict[str, list[Any]] = {
    "attn_implementation": ["kernels-community/flash-attn2", {"": "a/b"}, "paged|a/b@main", 5],
    "_attn_implementation": ["kernels-community/flash-attn2"],
    "_attn_implementation_internal": ["a/b"],
    "experts_implementation": ["kernels-community/moe"],
    "_experts_implementation": ["a/b"],
    "transformers_weights": ["../x.safetensors", "adapter_model.bin", 5],
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_vl_moe"])
def test_a_config_cannot_name_code(kind: str, intact: Path, tmp_path: Path) -> None:
    for name, values in CODE.items():
        for value in values:
            for inner in {name, f"text_config.{name}"} if kind == "qwen3_vl_moe" else {name}:
                folder = copied(intact / kind, tmp_path / "broken")
                said = config(folder)
                (said["text_config"] if "." in inner else said)[name] = value
                (folder / "config.json").write_text(json.dumps(said))
                told = refusal(folder)
                assert told and f"config.json: {inner}" in told, (inner, value, told)


@pytest.mark.filterwarnings("ignore")
def test_what_would_choose_installed_code_is_not_followed_and_told(
    intact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from moe_lab.models.checkpoint import load

    folder = copied(intact / "mixtral", tmp_path / "chosen")
    chosen = {
        "attn_implementation": "flash_attention_2", "_experts_implementation": "deepgemm",
        "use_kernels": True, "fusion_config": {"x": 1}, "auto_map": {"AutoModel": "evil--x--m.X"},
    }  # fmt: skip
    set_config(folder, chosen)
    assert [one.split("=")[0].split(".")[0] for one in unheeded(config(folder))] == [*chosen]
    with caplog.at_level("INFO"):
        model = load(folder)
    assert "it is not followed" in caplog.text and "flash_attention_2" in caplog.text
    assert model.config._attn_implementation == load(intact / "mixtral").config._attn_implementation
    assert not hasattr(model.config, "fusion_config")


def test_a_way_to_route_that_no_code_knows(tmp_path: Path) -> None:
    for value in ("x", 5, "noaux_tc"):
        with pytest.raises(UserError, match=r"topk_method=.*greedy, group_limited_greedy"):
            check_values(tmp_path, {"model_type": "deepseek_v2", "topk_method": value}, [])
    for value in ("greedy", None):
        check_values(tmp_path, {"model_type": "deepseek_v2", "topk_method": value}, [])


def test_numbers_that_models_of_the_hub_have_pass(tmp_path: Path) -> None:
    """Infinite limits, sentinels of token ids, fields of no family, null for all that may lack."""
    values = {
        "time_step_limit": [0.0, INF], "swiglu_limit": INF, "pad_token_id": -1, "rope_theta": None,
        "rms_norm_eps": 0, "attention_dropout": 0, "num_nextn_predict_layers": 0, "dtype": None,
        "no_rope_layers": [0, 1, 1, 0], "attn_implementation": "sdpa", "sliding_window": None,
        "layer_norm_epsilon": 1e-5, "rope_scaling": {"factor": 40, "beta_fast": 32}, "x": None,
        "time_step_max": {"__float__": "Infinity"},
    }  # fmt: skip
    check_values(tmp_path / "config.json", values, [])
    with pytest.raises(UserError, match=r"rms_norm_eps\.__float__"):
        check_values(tmp_path, {"rms_norm_eps": {"__float__": "NaN"}}, [])


@pytest.mark.parametrize(
    "values",
    [
        {"n_group": 1, "topk_group": 3},
        {"chunk_size": 0},
        {"chunk_size": -1},
        {"attention_chunk_size": 0},
        {"zero_expert_num": 10**9},
        {"zero_expert_num": "2"},
        {"partial_rotary_factor": 2},
        {"rope_parameters": {"partial_rotary_factor": "8"}},
        {"rope_parameters": {"full_attention": {"partial_rotary_factor": 10**9}}},
    ],
    ids=str,
)
def test_a_value_with_which_a_forward_would_fail_or_fill_the_memory(values: Any) -> None:
    stored = [Stored(Path("model.safetensors"), "weight", torch.float32, 4000, "F32", (1000,))]
    name = list(values)[-1]
    with pytest.raises(UserError, match=f"config.json: {name}"):
        check_values(Path("config.json"), {"model_type": "glm4_moe"} | values, stored)


def test_ordinary_values_pass() -> None:
    stored = [Stored(Path("model.safetensors"), "weight", torch.float32, 4000, "F32", (1000,))]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ordinary = {"n_group": None, "topk_group": None, "zero_expert_num": 2, "chunk_size": 256}
    ordinary |= {"attention_chunk_size": None, "partial_rotary_factor": 1, "rope_parameters": rope}
    check_values(Path("config.json"), {"model_type": "glm4_moe"} | ordinary, stored)


def test_eager_experts_are_not_told() -> None:
    assert unheeded({"model_type": "mixtral", "experts_implementation": "eager"}) == []
    assert unheeded({"experts_implementation": "deepgemm"}) == ["experts_implementation=deepgemm"]
