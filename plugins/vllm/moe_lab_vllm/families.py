"""The models: each a family of vLLM's, with our layers in it."""

from __future__ import annotations

from vllm.model_executor.models import deepseek_v2, glm4_moe, mixtral, olmoe, qwen2_moe, qwen3_moe
from vllm.model_executor.models.utils import WeightsMapper

from moe_lab_vllm.building import Family
from moe_lab_vllm.model import OwnForm, OwnLayers

# Dense layers in families that have none themselves, and so do not know their names.
DENSE = WeightsMapper(
    orig_to_new_stacked={
        f".{block}.{part}_proj.": (f".{block}.gate_up_proj.", shard)
        for block in ("mlp", "block_sparse_moe")
        for shard, part in enumerate(("gate", "up"))
    }
)
QKV = WeightsMapper(
    orig_to_new_stacked={f".{part}_proj": (".qkv_proj", part) for part in ("q", "k", "v")}
)


class Qwen2MoeLayers(OwnLayers, qwen2_moe.Qwen2MoeModel):
    family = Family(qwen2_moe.Qwen2MoeDecoderLayer, num_experts="num_experts")


class MoeLabQwen2MoeForCausalLM(OwnForm, qwen2_moe.Qwen2MoeForCausalLM):
    layers_class = Qwen2MoeLayers


class Qwen3MoeLayers(OwnLayers, qwen3_moe.Qwen3MoeModel):
    family = Family(qwen3_moe.Qwen3MoeDecoderLayer, num_experts="num_experts")


class MoeLabQwen3MoeForCausalLM(OwnForm, qwen3_moe.Qwen3MoeForCausalLM):
    layers_class = Qwen3MoeLayers


class MixtralLayers(OwnLayers, mixtral.MixtralModel):
    family = Family(
        mixtral.MixtralDecoderLayer,
        num_experts="num_local_experts",
        width="intermediate_size",
        block="block_sparse_moe",
    )
    hf_to_vllm_mapper = QKV | DENSE


class MoeLabMixtralForCausalLM(OwnForm, mixtral.MixtralForCausalLM):
    layers_class = MixtralLayers
    hf_to_vllm_mapper = MixtralLayers.hf_to_vllm_mapper


class OlmoeLayers(OwnLayers, olmoe.OlmoeModel):
    family = Family(olmoe.OlmoeDecoderLayer, num_experts="num_experts", width="intermediate_size")


class MoeLabOlmoeForCausalLM(OwnForm, olmoe.OlmoeForCausalLM):
    layers_class = OlmoeLayers
    hf_to_vllm_mapper = QKV | DENSE


class DeepseekLayers(OwnLayers, deepseek_v2.DeepseekV2Model):
    family = Family(deepseek_v2.DeepseekV2DecoderLayer, num_experts="n_routed_experts")


class MoeLabDeepseekV2ForCausalLM(OwnForm, deepseek_v2.DeepseekV2ForCausalLM):
    layers_class = DeepseekLayers


class MoeLabDeepseekV3ForCausalLM(OwnForm, deepseek_v2.DeepseekV3ForCausalLM):
    layers_class = DeepseekLayers


class Glm4MoeLayers(OwnLayers, glm4_moe.Glm4MoeModel):
    family = Family(glm4_moe.Glm4MoeDecoderLayer, num_experts="n_routed_experts")


class MoeLabGlm4MoeForCausalLM(OwnForm, glm4_moe.Glm4MoeForCausalLM):
    layers_class = Glm4MoeLayers
