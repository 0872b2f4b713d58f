"""The models that are compressed and served: the shipped ones, and tiny random ones of families."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab.families.tiny import tiny_config, tiny_model
from moe_lab.models.checkpoint import resolve

SHIPPED_MODELS = ("tiny_mixtral", "tiny_qwen2_moe", "tiny_deepseek")
RANDOM = (
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe",
    "gpt_oss",
)  # fmt: skip
_TOKENIZER = "tiny_mixtral"  # that of the random ones
# Sizes that the engines' attention kernels take; those of the families' tables are smaller.
SIZES = {
    "vocab_size": 2048, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
    "moe_intermediate_size": 32, "intermediate_size": 96, "shared_expert_intermediate_size": 32,
    "head_dim": 32,
}  # fmt: skip
# Of latent attention vLLM takes DeepSeek's own sizes alone.
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
# Beside these sizes, what an engine's code takes for granted.
_OF_TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 32},
    "olmoe": {"intermediate_size": 32},
    # With YaRN, as the real ones have it: vLLM takes no other, llama.cpp rounds where it begins.
    "gpt_oss": {"intermediate_size": 32},
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "glm4_moe": {"head_dim": 32, "use_qk_norm": True},
}


@dataclass(frozen=True)
class Subject:
    """A dense model; random: drawn from a fixed seed, of the type `model_type`."""

    name: str
    model_type: str
    random: bool

    def write(self, folder: Path) -> Path:
        """The folder of its checkpoint: the shipped one, or a new one at `folder`."""
        if not self.random:
            return resolve(f"shipped:{self.name}").path
        model = tiny_model(self.model_type, **_sizes(self.model_type))
        model.save_pretrained(folder)
        for file in resolve(f"shipped:{_TOKENIZER}").path.glob("tokenizer*"):
            shutil.copyfile(file, folder / file.name)
        return folder


def _sizes(model_type: str) -> dict[str, Any]:
    there = tiny_config(model_type).to_dict()
    latent = "qk_rope_head_dim" in there
    sizes = {name: value for name, value in SIZES.items() if name in there}
    if latent:
        sizes = {name: value for name, value in sizes.items() if name != "head_dim"} | LATENT
    return sizes | _OF_TYPES.get(model_type, {})


def subjects() -> list[Subject]:
    """All of them, the shipped ones first."""
    shipped = [Subject(name, _model_type(name), random=False) for name in SHIPPED_MODELS]
    return shipped + [Subject(f"random {name}", name, random=True) for name in RANDOM]


def _model_type(name: str) -> str:
    kind: str = resolve(f"shipped:{name}").config.model_type
    return kind
