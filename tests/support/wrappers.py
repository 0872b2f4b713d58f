"""Tiny random models of several kinds of input, whose text model is a Mixture of Experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, LATENT, SPARSE
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from moe_lab.models.opening import model_class

IMAGE = 90  # the token that stands for a part of the image
TOKENS = dict(
    image_token_id=IMAGE,
    video_token_id=91,
    vision_start_token_id=92,
    vision_end_token_id=93,
    image_start_token_id=92,
    image_end_token_id=93,
    video_start_token_id=94,
    video_end_token_id=95,
)
ROPE = dict(rope_theta=10000.0, rope_type="default", mrope_section=[2, 1, 1])
TOWER = dict(
    depth=1,
    hidden_size=16,
    num_heads=2,
    intermediate_size=16,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    out_hidden_size=32,
    num_position_embeddings=16,
)
GLM = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=48,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
QWEN3_5 = SPARSE | dict(
    shared_expert_intermediate_size=24,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"] * 2,
)
ARIA = dict(moe_num_experts=8, moe_topk=2, intermediate_size=16, moe_num_shared_experts=1)
SIGLIP = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=16,
    patch_size=4,
)
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": TOKENS
    | dict(
        text_config=COMMON | SPARSE | dict(head_dim=8, rope_parameters=ROPE),
        vision_config=TOWER | dict(deepstack_visual_indexes=[0]),
    ),
    "glm4v_moe": TOKENS
    | dict(
        text_config=COMMON
        | GLM
        | dict(rope_parameters=ROPE | dict(mrope_section=[1, 1, 0], partial_rotary_factor=0.5)),
        vision_config=TOWER | dict(image_size=16),
    ),
    "qwen3_5_moe": TOKENS
    | dict(
        text_config=COMMON
        | QWEN3_5
        | dict(head_dim=16, rope_parameters=ROPE | dict(partial_rotary_factor=0.5)),
        vision_config=TOWER,
    ),
    "aria": dict(
        image_token_index=IMAGE,
        projector_patch_to_query_dict={"16": 4},
        text_config=COMMON | ARIA,
        vision_config=SIGLIP,
    ),
    "mistral4": COMMON | LATENT | dict(n_group=1, topk_group=1, q_lora_rank=16),
}
EACH_WRAPPER = pytest.mark.parametrize("kind", WRAPPERS)
SEEING = pytest.mark.parametrize("kind", [kind for kind in WRAPPERS if kind != "mistral4"])


def tiny_wrapper(kind: str) -> PreTrainedModel:
    """A tiny random model of this type, every parameter drawn, in evaluation mode and float32."""
    return random_model(AutoConfig.for_model(kind, **WRAPPERS[kind]))


def random_model(config: Any) -> PreTrainedModel:
    """A model of this config with every parameter drawn, in evaluation mode and float32."""
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape) * scale + ("norm" in name))
    return model


def image_prompt(kind: str) -> dict[str, Tensor]:
    """Text around a random image: pixels, and the tokens that stand for them."""
    generator = torch.Generator().manual_seed(0)
    number = 4
    words = torch.randint(3, 80, (1, 10), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, number), IMAGE), words[:, 4:]], dim=1)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "aria":
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        return prompt | {"pixel_values": pixels, "pixel_mask": torch.ones(1, 16, 16).bool()}
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    seen = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return prompt | seen | {"mm_token_type_ids": (ids == IMAGE).long()}


def write_wrapper(kind: str, folder: Path, tokenizer: Any = None) -> None:
    """Such a model as a checkpoint, with files of a processor beside it.

    tokenizer: its words are the model's, and the tokens that stand for images come behind them.
    """
    config = AutoConfig.for_model(kind, **WRAPPERS[kind])
    if tokenizer is not None:
        config.text_config.vocab_size = len(tokenizer) + 10
        config.text_config.max_position_embeddings = 512
        for number, name in enumerate(TOKENS):
            setattr(config, name, len(tokenizer) + number)
    random_model(config).save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor.json"):
        (folder / name).write_text('{ "size":   16,\n"of": "' + name + '"}')
    (folder / "chat_template.jinja").write_text("{{ messages }} \n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
