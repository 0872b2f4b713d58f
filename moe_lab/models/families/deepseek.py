"""DeepSeekMoE-16B (2401.06066), model_type `deepseek`, as a native Qwen2-MoE: the same function.

The original block is shared(x) + sum over the top-k of softmax(logits)_i * E_i(x). Qwen2-MoE has a
sigmoid gate behind its shared expert: a gate of zeros halves its output, so its down projection is
doubled, both exactly. Serving engines expect biases at q, k and v: they are zeros. In half
precision one difference remains: the original computes its router's logits in float32, Qwen2-MoE in
the model's own dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lab.types import UserError

NATIVE = "qwen2_moe"
# Fields that keep their name; the first ones must be there.
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "vocab_size",
)
DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_cache": True,
}
# What Qwen2-MoE cannot say otherwise: the values that it can.
ONLY = {
    "scoring_func": ("softmax",),
    "routed_scaling_factor": (1, None),
    "topk_method": ("greedy", None),
    "n_group": (1, None),
    "attention_bias": (False, None),
    "rope_scaling": (None,),
}


def native_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model as a Qwen2-MoE; UserError where that cannot say it."""
    _check(values)
    layers = range(values["num_hidden_layers"])
    theta = float(values.get("rope_theta", 10000.0))
    config: dict[str, Any] = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": NATIVE}
    config |= {field: values[field] for field in REQUIRED}
    config |= {field: values.get(field, default) for field, default in DEFAULTS.items()}
    config |= {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in layers if not _is_moe(values, layer)],
        "num_experts": values["n_routed_experts"],
        "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        "output_router_logits": False,
        "qkv_bias": True,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # for versions of transformers before 5
        "router_aux_loss_coef": values.get("aux_loss_alpha", 0.001),
        "shared_expert_intermediate_size": _shared_width(values),
        "use_sliding_window": False,
    }
    dtype = values.get("dtype", values.get("torch_dtype"))
    return config | ({"dtype": dtype} if dtype else {})


def _check(values: Mapping[str, Any]) -> None:
    counts = (*REQUIRED, "n_routed_experts", "n_shared_experts")
    wrong = [field for field in counts if not isinstance(values.get(field), int)]
    wrong += [field for field in counts if field not in wrong and values[field] < 1]
    if wrong:
        given = ", ".join(f"{field}={values.get(field)}" for field in wrong)
        raise UserError(
            f"config.json of a `deepseek` checkpoint must give whole numbers of at least 1 for "
            f"{', '.join(wrong)}; it has {given}"
        )
    for field, possible in ONLY.items():
        if values.get(field, possible[0]) not in possible:
            raise UserError(
                f"config.json has {field}={values[field]!r}: this `deepseek` checkpoint cannot be "
                f"converted, for Qwen2-MoE, its native form, can only say {possible[0]!r}"
            )
    if values.get("norm_topk_prob") and values["num_experts_per_tok"] == 1:
        raise UserError(
            "config.json has norm_topk_prob=True with num_experts_per_tok=1, which the original "
            "ignores and Qwen2-MoE does not: set norm_topk_prob to false in it"
        )
    if not any(_is_moe(values, layer) for layer in range(values["num_hidden_layers"])):
        raise UserError("config.json makes every layer dense: there is no expert to compress")


def _is_moe(values: Mapping[str, Any], layer: int) -> bool:
    first, step = values.get("first_k_dense_replace", 0), values.get("moe_layer_freq", 1)
    return bool(layer >= first and layer % step == 0)


def _shared_width(values: Mapping[str, Any]) -> int:
    width: int = values["n_shared_experts"] * values["moe_intermediate_size"]
    return width


def original_shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the original checkpoint with its shape."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    key_rows = hidden // heads * (values.get("num_key_value_heads") or heads)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (values["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not values.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (values["vocab_size"], hidden)

    def mlp(name: str, width: int) -> None:
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, hidden)
        shapes[f"{name}.down_proj.weight"] = (hidden, width)

    for layer in range(values["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
        for projection, rows in (("q", hidden), ("k", key_rows), ("v", key_rows), ("o", hidden)):
            shapes[f"{name}.self_attn.{projection}_proj.weight"] = (rows, hidden)
        if not _is_moe(values, layer):
            mlp(f"{name}.mlp", values["intermediate_size"])
            continue
        shapes[f"{name}.mlp.gate.weight"] = (values["n_routed_experts"], hidden)
        mlp(f"{name}.mlp.shared_experts", _shared_width(values))
        for expert in range(values["n_routed_experts"]):
            mlp(f"{name}.mlp.experts.{expert}", values["moe_intermediate_size"])
    return shapes


def is_buffer(name: str) -> bool:
    """Rotary frequencies, which old exports hold and every model computes itself."""
    return name.endswith(".rotary_emb.inv_freq")


def native_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of Qwen2-MoE that follow from one of the original's, in the same dtype."""
    if re.search(r"\.self_attn\.[qkv]_proj\.weight$", name):
        bias = torch.zeros(len(tensor), dtype=tensor.dtype)
        return {name: tensor, name.replace(".weight", ".bias"): bias}
    if name.endswith(".mlp.gate.weight"):
        shared_gate = torch.zeros(1, tensor.shape[1], dtype=tensor.dtype)
        return {name: tensor, name.replace(".gate.", ".shared_expert_gate."): shared_gate}
    if ".mlp.shared_experts." in name:
        native = name.replace(".shared_experts.", ".shared_expert.")
        return {native: tensor * 2 if ".down_proj." in name else tensor}
    return {name: tensor}


def adapt_texts(folder: Path) -> None:
    """Write into tokenizer.json the BOS token that LlamaTokenizerFast adds by its config alone.

    That class also brings a pre-tokenizer of its own where the files are loaded by it, which is not
    theirs: the converted ones name the class that takes tokenizer.json at its word.
    """
    settings_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not settings_file.is_file() or not tokenizer_file.is_file():
        return
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return
    tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    ends = {
        "bos": _content(settings.get("bos_token")) if settings.get("add_bos_token", True) else None,
        "eos": _content(settings.get("eos_token")) if settings.get("add_eos_token") else None,
    }
    tokenizer["post_processor"] = _template(ends["bos"], ends["eos"], tokenizer)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("padding_side", "left")  # as LlamaTokenizerFast has it
    for file, values in ((settings_file, settings), (tokenizer_file, tokenizer)):
        text = json.dumps(values, ensure_ascii=False, indent=2)
        file.write_text(text + "\n", encoding="utf-8")


def _content(token: Any) -> str | None:
    content: str | None = token["content"] if isinstance(token, dict) else token
    return content


def _template(bos: str | None, eos: str | None, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The post-processor that LlamaTokenizerFast builds, in tokenizer.json's own words."""
    ids = dict(tokenizer["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        pieces = [
            {"SpecialToken": {"id": bos, "type_id": type_id}} if bos else None,
            {"Sequence": {"id": sequence, "type_id": type_id}},
            {"SpecialToken": {"id": eos, "type_id": type_id}} if eos else None,
        ]
        return [piece for piece in pieces if piece]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in (bos, eos)
            if token
        },
    }
