"""What serving engines and converters read in a config.json, and transformers does not write there.

transformers keeps what never differs within a family out of its config (DeepSeek-V3's router is
always a sigmoid), or says it in a way of its own (a list of dense layers). vLLM and llama.cpp read
the fields that the family's own checkpoints have, and take another value for one that is missing,
without a word: so a model that transformers made is served as garbage. Whatever stands here is what
transformers' own code of the family computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_lab.models.layers import COUNT_FIELDS

# DeepSeek-V3's router: a sigmoid, of which the choice (not the weight) has a bias added.
BIASED_SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
Told = Any | Callable[[Any], Any]  # a value, or how it follows from the config


def _rotary_dim(config: Any) -> int:
    return int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _head_dim(config: Any) -> int:
    return int(config.hidden_size // config.num_attention_heads)


# By model type: the fields, where the source has none.
READ_BY_ENGINES: Mapping[str, Mapping[str, Told]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": BIASED_SIGMOID,
    "deepseek_v32": BIASED_SIGMOID,
    "dots1": BIASED_SIGMOID,
    "exaone_moe": BIASED_SIGMOID,
    "glm4_moe": {"head_dim": _head_dim},
    "glm4_moe_lite": BIASED_SIGMOID,
    "glm_moe_dsa": BIASED_SIGMOID,
    "hy_v3": {
        "expert_hidden_dim": lambda config: config.moe_intermediate_size,
        "route_norm": True,
        "qk_norm": True,
    },
    "longcat_flash": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_type": "identity",
    },
    "minimax_m2": {
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "rotary_dim": _rotary_dim,
    },
}
# Types whose dense layers transformers lists (`mlp_layer_types`), and engines count from the front.
COUNTED_FROM_THE_FRONT = (
    "axk1", "deepseek_v32", "exaone_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3",
)  # fmt: skip
# Types for which engines read a list of ones and zeros in their place.
LISTED_BY_ONES = ("mimo_v2_flash", "minimax_m3_vl_text")


def complete_config(values: dict[str, Any], config: Any) -> None:
    """Add to a config's JSON object what others read in it, in place.

    values, config: of the text model. What the source says stays, but for its other ways of saying
    which layers are dense: these follow `mlp_layer_types`.
    """
    for field, told in READ_BY_ENGINES.get(config.model_type, {}).items():
        if values.get(field) is None:
            values[field] = told(config) if callable(told) else told
    _say_counts(values, config)
    _say_dense_layers(values, config)


def _say_counts(values: dict[str, Any], config: Any) -> None:
    """Write the number of experts under every name that the config answers to.

    transformers 5 writes Qwen3-MoE's as num_local_experts alone, 4.x reads num_experts.
    """
    written = [field for field in COUNT_FIELDS if field in values]
    for field in COUNT_FIELDS:
        if written and field not in values and hasattr(config, field):
            values[field] = values[written[0]]


def _say_dense_layers(values: dict[str, Any], config: Any) -> None:
    """Say `mlp_layer_types` as engines read it: a number of leading dense layers, ones and zeros.

    What an engine cannot read so (dense layers further back) it refuses, since it finds tensors
    that belong nowhere; with a number that is too large it would leave experts out in silence.
    """
    types = values.get("mlp_layer_types")
    if not types:
        return
    sparse = [int(one == "sparse") for one in types]
    leading = sparse.index(1) if 1 in sparse else len(sparse)
    if config.model_type in COUNTED_FROM_THE_FRONT or "first_k_dense_replace" in values:
        values["first_k_dense_replace"] = leading
    every = values.get("moe_layer_freq")
    if config.model_type in LISTED_BY_ONES or isinstance(every, list):
        values["moe_layer_freq"] = sparse
    elif isinstance(every, int) and every > 1:
        pattern = [int(at >= leading and at % every == 0) for at in range(len(sparse))]
        values["moe_layer_freq"] = every if pattern == sparse else 1
