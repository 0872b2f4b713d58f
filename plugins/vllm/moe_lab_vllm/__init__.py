"""A vLLM plugin that serves the checkpoints of moe_lab's own form.

vLLM calls `register` in each of its processes. Nothing here imports moe_lab: what is needed of it
is the description of the form, which lies in the checkpoint's config.json (`form.py`).
Left to themselves are vLLM's files and functions: the models are subclasses, and are registered.
"""

from __future__ import annotations

TESTED = "0.32"  # the vLLM whose classes the models are derived from
FAMILIES = {
    "qwen2_moe": "MoeLabQwen2MoeForCausalLM",
    "qwen3_moe": "MoeLabQwen3MoeForCausalLM",
    "mixtral": "MoeLabMixtralForCausalLM",
    "olmoe": "MoeLabOlmoeForCausalLM",
    "deepseek_v2": "MoeLabDeepseekV2ForCausalLM",
    "deepseek_v3": "MoeLabDeepseekV3ForCausalLM",
    "glm4_moe": "MoeLabGlm4MoeForCausalLM",
}


def register() -> None:
    """Teach this process the form's model_type and the models; called by vLLM, more than once."""
    import vllm
    from transformers import AutoConfig
    from vllm.logger import init_logger
    from vllm.model_executor.models import ModelRegistry

    from moe_lab_vllm.config import MoeLabConfig

    if not vllm.__version__.startswith(f"{TESTED}."):
        init_logger("vllm.plugins.moe_lab_vllm").warning_once(
            f"moe_lab_vllm is tested with vLLM {TESTED}, this is {vllm.__version__}: compare a few "
            "answers with moe_lab.load before you rely on it"
        )
    AutoConfig.register("moe_lab", MoeLabConfig, exist_ok=True)
    for name in FAMILIES.values():
        ModelRegistry.register_model(name, f"moe_lab_vllm.families:{name}")
