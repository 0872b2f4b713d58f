"""Sizes of tiny models: guessed by the names of config fields, and the few that must be given.

A type that is new in a newer transformers is built by the guess alone. What it takes besides, where
it takes something, is an entry of `SPECIAL`.
"""

from __future__ import annotations

from typing import Any

NUM_EXPERTS, TOP_K, NUM_LAYERS, VOCABULARY = 8, 2, 4, 128
HIDDEN, DENSE_WIDTH, EXPERT_WIDTH = 32, 48, 16
# Ids from here on are text; those below are given to whatever the config calls a token.
FIRST_TEXT_ID = 64

# By field name, in the text part of any config that has such a field.
TEXT: dict[str, Any] = {
    **dict.fromkeys(
        ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), NUM_EXPERTS
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
            "top_k_experts",
        ),
        TOP_K,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers",
         "decoder_layers"),
        NUM_LAYERS,
    ),
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "moe_hidden_size",
            "expert_ffn_hidden_size", "shared_expert_intermediate_size",
            "shared_intermediate_size", "moe_shared_expert_intermediate_size",
            "shared_experts_intermediate_size", "share_expert_dim",
        ),
        EXPERT_WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_hidden_size", "dense_intermediate_size",
            "prefix_dense_intermediate_size", "intermediate_size_mlp", "d_ff", "encoder_ffn_dim",
            "decoder_ffn_dim",
        ),
        DENSE_WIDTH,
    ),
    **dict.fromkeys((
            "num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "swa_num_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(
        (
            "head_dim", "swa_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
            "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "kv_channels",
            "d_kv", "d_rel", "mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size",
        ),
        8,
    ),
    **dict.fromkeys(
        (
            "q_lora_rank", "kv_lora_rank", "index_topk",
            "index_head_dim", "sliding_window", "sliding_window_size", "mamba_chunk_size",
            "chunk_size", "block_size", "router_hidden_size",
        ),
        16,
    ),
    **dict.fromkeys(("max_position_embeddings", "model_max_length", "max_seq_len"), 512),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(
        ("linear_num_key_heads", "index_n_heads", "mamba_n_groups"), 2
    ),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(
        (
            "n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
            "first_k_dense_replace", "num_dense_layers",
        ),
        1,
    ),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    # Not 1, which would hide that a factor is forgotten.
    **dict.fromkeys(
        (
            "routed_scaling_factor", "moe_routed_scaling_factor", "moe_router_scaling_factor",
            "route_scale",
        ),
        2.5,
    ),
    **dict.fromkeys(
        ("projector_hidden_size", "projection_hidden_size", "vision_hidden_size",
         "out_hidden_size"), 16),
    "mamba_dt_rank": 4,
    "rel_extent": 64,
    "attention_chunk_size": 64,
    "hidden_size_per_layer_input": 0,
    "tie_word_embeddings": False,
    "use_mamba_kernels": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

# Given only to configs that use it: whose own value is neither None nor 1.
WHERE_USED = {"sliding_window", "n_group", "num_expert_group", "topk_group"}

# The same for parts that see or hear.
SENSES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "vision_output_dim"), 16),
    **dict.fromkeys(("audio_hidden_size", "vision_hidden_size"), 16),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size"), 16),
    "adapter_out_dim": HIDDEN,
    **dict.fromkeys(("intermediate_size", "projector_input_dim", "projector_output_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "depth", "encoder_layers"), 1),
    **dict.fromkeys(
        ("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2
    ),
    "head_dim": 8,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim"), HIDDEN),
    **dict.fromkeys(("encoder_ffn_dim", "d_model", "downsample_hidden_size"), 16),
    **dict.fromkeys(("mlp_dim", "output_channels", "projection_hidden_dim"), 16),
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

SENSES_NAMES = ("vision", "audio", "sound", "talker", "code2wav", "visual", "sam", "encoder")

# By type, in its own config: what the names do not tell. None: not given at all.
SPECIAL: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {4: 4, 16: 4}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2,
        },
    },
    "deepseek_v4": {
        "num_key_value_heads": 1, "head_dim": 16, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2,
        "index_topk": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": [
            "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
            "sliding_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [16, 16], "global_attn_indexes": [0]},
    "deepseek_ocr2_text": {
        "num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {
        "head_dim": 16, "num_key_value_heads": 4, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
        "layer_types": ["sliding_attention", "indexed_attention"] * 2,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
        },
    },
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "num_key_value_heads": 4},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling_vision": {"patch_size": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"num_experts_per_tok": 1},
    "llama4_vision_model": {"pixel_shuffle_ratio": 1.0},
    "longcat_flash": {
        "head_dim": 8, "num_layers": 3, "num_hidden_layers": 6, "zero_expert_num": 2,
    },
    "muse_spark_audio": {
        "num_hidden_layers": 4, "hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1),
    },
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_groups": 2,
    },
    "qwen4_exp_text": {
        "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20},
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 16, "num_sliding_attention_heads": 4},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [16, 16], "global_attn_indexes": [0]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Structures that a type has only with other values, as rows of their own: "type+what".
TYPE_VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v2+groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "nemotron_h+latent": {"moe_latent_size": 24},
    "qwen3_moe+every_second": {"decoder_sparse_step": 2},
}
