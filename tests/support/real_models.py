"""The models of conf/model/ that are on the hub: their structure, and tiny ones that keep it.

Tiny: every size becomes small and every list short, and what is no size stays as it is: the kinds
of layers, shared experts, first dense layers, groups, scaling, biases, tied embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from running import ROOT
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

OPTIONS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
           for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))}  # fmt: skip
REAL = {name: option for name, option in OPTIONS.items() if "architecture" in option}

NUM_LAYERS, NUM_EXPERTS, MOST_CHOSEN = 4, 8, 3
SIZES = {
    "hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "head_dim": 8,
    "num_local_experts": NUM_EXPERTS, "num_experts": NUM_EXPERTS, "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 16,
    "intermediate_size_mlp": 48, "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "sliding_window": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "moe_layer_end_index": NUM_LAYERS - 1,
}  # fmt: skip
AT_MOST = {
    "num_experts_per_tok": MOST_CHOSEN, "moe_k": MOST_CHOSEN, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
VISION = {
    "depth": 2, "num_hidden_layers": 2, "hidden_size": 32, "num_heads": 2, "num_attention_heads": 2,
    "intermediate_size": 128, "image_size": 28, "projector_input_dim": 32,
    "projector_output_dim": 32, "vision_output_dim": 32, "out_hidden_size": 32,
}  # fmt: skip


def shrunk(architecture: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The same structure in small, for a tokenizer of so many tokens."""
    if "text_config" in architecture:
        vision = {k: VISION.get(k, value) for k, value in architecture["vision_config"].items()}
        text = shrunk(architecture["text_config"], vocab_size)
        return architecture | {"text_config": text, "vision_config": vision}
    heads, keys = architecture["num_attention_heads"], architecture["num_key_value_heads"]
    small = {name: _small(name, value) for name, value in architecture.items()}
    if "moe_intermediate_size" in small:
        small["intermediate_size"] = 48  # of dense layers, where experts have a size of their own
    small |= {"vocab_size": vocab_size, "num_key_value_heads": 4 if keys == heads else 2}
    small |= {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
    return small | {"pad_token_id": 0}


def _small(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, list):
        return some_of_each(value) if value and isinstance(value[0], str) else value
    return min(value, AT_MOST[name]) if name in AT_MOST else SIZES.get(name, value)


def some_of_each(kinds: Sequence[str]) -> list[str]:
    """As many as there will be layers, each kind among them: first ones and last, in order."""
    chosen = {kinds.index(kind) for kind in kinds}
    last = len(kinds) - 1
    while len(chosen) < NUM_LAYERS:
        chosen.add(last)
        last -= 1
    return [kinds[index] for index in sorted(chosen)]


def write_tiny(architecture: dict[str, Any], folder: Path, tokenizer: Any) -> None:
    """A random checkpoint of a small architecture, in float32, of the class that the hub's has."""
    several = "vision_config" in architecture
    automatic: Any = AutoModelForImageTextToText if several else AutoModelForCausalLM
    config = AutoConfig.for_model(**architecture)
    torch.manual_seed(0)
    model = automatic.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            mean = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape) * scale + mean)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def without_weights(architecture: dict[str, Any]) -> nn.Module:
    """The language model of an architecture on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))


def counted(architecture: dict[str, Any]) -> tuple[int, int, int]:
    """Parameters, those that a token uses, and those of the two embeddings, by names alone."""
    model = without_weights(architecture)
    text = architecture.get("text_config", architecture)
    experts = next(text[name] for name in SIZES if "experts" in name and name in text)
    chosen = text.get("num_experts_per_tok") or text["moe_k"]
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    ends = {id(one.weight): one.weight.numel() for one in
            (model.get_input_embeddings(), model.get_output_embeddings())}  # fmt: skip
    total = sum(sizes.values())
    return total, total - routed + routed * chosen // experts, sum(ends.values())
