"""A tiny Qwen2-MoE whose sizes are easily written down."""

from __future__ import annotations

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

VOCABULARY, HIDDEN, LAYERS, EXPERTS, TOP_K, WIDTH, SHARED, DENSE = 96, 32, 3, 8, 2, 16, 24, 40


def tiny(experts: int = EXPERTS, tied: bool = False) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=DENSE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        mlp_only_layers=[0],
        tie_word_embeddings=tied,
    )
    return Qwen2MoeForCausalLM(config).eval()
