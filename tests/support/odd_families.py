"""Tiny real models of the families that need an adapter: random weights, 8 experts, hidden 32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from families import COMMON, logits_of, tiny_batch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

HEADS = "num_attention_heads"
ADAPTED: dict[str, dict[str, Any]] = {
    "llama4_text": COMMON
    | dict(
        num_local_experts=8,
        num_experts_per_tok=1,
        intermediate_size=16,
        intermediate_size_mlp=48,
        head_dim=8,
        attention_chunk_size=64,
        interleave_moe_layer_step=1,
    ),
    "jetmoe": {name: value for name, value in COMMON.items() if name != HEADS}
    | dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=16, kv_channels=8),
    "dbrx": dict(
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=4,
        max_seq_len=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=16, moe_num_experts=8, moe_top_k=2),
    ),
    "longcat_flash": {k: value for k, value in COMMON.items() if k != "num_hidden_layers"}
    | dict(
        num_layers=3,
        num_key_value_heads=4,
        n_routed_experts=8,
        zero_expert_num=4,
        moe_topk=3,
        expert_ffn_hidden_size=16,
        ffn_hidden_size=48,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
    ),
    "step3p7": dict(
        text_config=COMMON
        | dict(
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            intermediate_size=48,
            share_expert_dim=24,
            head_dim=8,
            sliding_window=16,
            moe_router_scaling_factor=3.0,
            swiglu_limits=[0.0, 0.0, 0.05, 0.0],
            mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        ),
        vision_config=dict(width=16, layers=1, heads=2, image_size=28, patch_size=14),
    ),
}
# Loads folders with stock transformers alone: logits, and whether cached generation is the same.
STOCK = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
import transformers

kind = getattr(transformers, sys.argv[1])
batch = load_file(sys.argv[2])
found = {}
for folder in sys.argv[3:]:
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, ValueError) as error:
        found[folder] = "refused"
        continue
    with torch.no_grad():
        save_file({"logits": model(**batch, use_cache=False).logits}, folder + "/stock.logits")
    ids = batch["input_ids"][:1, :6]
    one, other = (
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                       min_new_tokens=6, do_sample=False, use_cache=cache).tolist()
        for cache in (True, False)
    )
    clean = not any(info.values())
    found[folder] = "clean, cached as not" if clean and one == other else str((info, one, other))
assert "moe_lab" not in sys.modules
print("RESULT" + json.dumps(found))
"""


def odd_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family, as `families.tiny_model` makes the others."""
    config = AutoConfig.for_model(family, **(ADAPTED[family] | changes))
    kind = AutoModelForImageTextToText if family == "step3p7" else AutoModelForCausalLM
    torch.manual_seed(seed)
    model: PreTrainedModel = kind.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.rand(buffer.shape) * 0.1)
    return model


def in_stock(*folders: Path, kind: str = "AutoModelForCausalLM") -> list[tuple[str, Tensor | None]]:
    """What a process without moe_lab says of each folder, and its logits on `tiny_batch`."""
    batch = folders[0].parent / "batch.safetensors"
    save_file(tiny_batch(), batch)
    said = fresh.result(STOCK, kind, batch, *folders)
    logits = [folder / "stock.logits" for folder in folders]
    return [
        (said[str(folder)], load_file(file)["logits"] if file.is_file() else None)
        for folder, file in zip(folders, logits, strict=True)
    ]


def chosen_by_stock(family: str, output: Any) -> Tensor:
    """The experts [T, K] that a stock router chose, from what it returns."""
    if family == "llama4_text":  # scores of 0 but for the chosen
        return output[0].topk(1, dim=1).indices
    if family == "jetmoe":
        return output[4].topk(2, dim=1).indices
    if family == "dbrx":
        return output.topk(2, dim=1).indices
    return output[2]


def stock_routers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The routers of the feed-forward blocks of a model that nothing has adapted, by layer."""
    found = {}
    for name, module in model.named_modules():
        if re.search(r"(feed_forward|mlp|ffn)\.(router|gate)$", name):
            found[int(next(part for part in name.split(".") if part.isdigit()))] = module
    return found


def masked_logits(model: PreTrainedModel, kept: dict[int, tuple[int, ...]]) -> Tensor:
    """The logits of stock code whose routers' logits are -inf for all experts but the kept."""
    gone = {
        id(weight): sorted(set(range(8)) - set(kept[index]))
        for index, router in stock_routers(model).items()
        for weight in router.parameters()
    }
    inner = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = inner(x, weight, bias)
        if id(weight) in gone:
            y = y.clone()
            y[..., gone[id(weight)]] = -torch.inf
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        return logits_of(model)
