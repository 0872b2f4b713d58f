"""Tiny real models of MoE families, with random weights: 4 layers, 8 experts, hidden 32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
LATENT = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=48,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_key_value_heads=4,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
SPARSE = dict(
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=48,
    decoder_sparse_step=1,
)
FAMILIES: dict[str, dict] = {
    "qwen2_moe": SPARSE
    | dict(
        num_experts_per_tok=3,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
        norm_topk_prob=False,
    ),
    "qwen3_moe": SPARSE | dict(head_dim=8, norm_topk_prob=True, mlp_only_layers=[]),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=16),
    "olmoe": dict(num_experts=8, num_experts_per_tok=3, intermediate_size=16, norm_topk_prob=False),
    "deepseek_v2": LATENT | dict(n_group=1, topk_group=1, topk_method="greedy"),
    "deepseek_v3": LATENT
    | dict(n_group=2, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True),
    "glm4_moe": dict(
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        intermediate_size=48,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        head_dim=8,
        norm_topk_prob=True,
    ),
    "gpt_oss": dict(
        num_local_experts=8,
        num_experts_per_tok=2,
        intermediate_size=16,
        head_dim=8,
        sliding_window=8,
    ),
}

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# Softmax, softmax shared out among the chosen, and sigmoid in groups with a bias.
ROUTER_KINDS = ("qwen2_moe", "mixtral", "deepseek_v3")


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model of a family, in evaluation mode and float32.

    Every parameter is drawn, also those that transformers initialises to a constant: routers of
    zeros and norms of ones would hide mistakes.
    """
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES.get(family, {}) | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.rand(buffer.shape))
    return model


def tiny_batch(seed: int = 0, padding: bool = True, batch: int = 3, length: int = 10) -> dict:
    """Token ids and an attention mask with rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(batch):
            mask[row, length - 2 * row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits_of(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(batch or tiny_batch())).logits
