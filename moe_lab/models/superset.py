"""A model as one of a family that can say more: the same function, under another family's name.

Mixtral cannot say that a layer is dense, and DeepSeek-V3 only that the first ones are. Qwen2-MoE
and GLM-4-MoE-Lite compute the same with the same tensors, and name each dense layer. Whatever of a
config the other family could not say, or is not known here, is an obstacle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.condensing import edited_blocks
from moe_lab.models.editing import set_block
from moe_lab.models.layers import moe_layers
from moe_lab.models.own_form import differing_layers, own_structures
from moe_lab.option import Option

SUPERSET = "superset"  # the option's value
Convert = Annotated[
    str | None,
    Option(
        "superset: as a family that computes the same and says more, where that makes it stock",
        among=(SUPERSET,),
    ),
]
OWN_FIELDS = ("moe_lab", "distinct_experts")  # of the form that the model was read from


@dataclass(frozen=True)
class Superset:
    """The family that can say more, and what becomes of the fields of a config.

    made: its fields that make it the same function; renamed: fields by their names there; count:
    its number of experts; only: values that are possible, of fields that it has not; unread: fields
    of published configs that the family's code does not read; empty: parts of the names of tensors
    that are new, all zeros; rounding: what differs in half precision.
    """

    model_type: str
    count: str
    made: Callable[[Any], dict[str, Any]]
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    rounding: str = ""


def _as_qwen2_moe(config: Any) -> dict[str, Any]:
    made = {
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": 0,
        "qkv_bias": False,
        "use_sliding_window": False,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    # Qwen2-MoE reads a head_dim that is there, also where it is null.
    return made | ({"head_dim": config.head_dim} if config.head_dim else {})


def _as_glm4_moe_lite(config: Any) -> dict[str, Any]:
    dense = config.first_k_dense_replace or 0
    sparse = config.num_hidden_layers - dense
    return {"mlp_layer_types": ["dense"] * dense + ["sparse"] * sparse}


SUPERSETS = {
    "mixtral": Superset(
        "qwen2_moe",
        count="num_experts",
        made=_as_qwen2_moe,
        renamed={
            "num_local_experts": ("num_experts",),
            "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
        },
        only={"sliding_window": (None,), "router_jitter_noise": (0.0,)},
        unread=("head_dim",),  # in `made`
        empty=("mlp.shared_expert.", "mlp.shared_expert_gate."),
        rounding="in half precision it rounds the router's weights, which Mixtral does not",
    ),
    "deepseek_v3": Superset(
        "glm4_moe_lite",
        count="n_routed_experts",
        made=_as_glm4_moe_lite,
        only={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
        unread=(
            "first_k_dense_replace", "head_dim", "num_nextn_predict_layers", "num_mtp_layers",
            "aux_loss_alpha", "seq_aux", "ep_size", "auto_map",
        ),
    ),
}  # fmt: skip


def obstacle_of(model: PreTrainedModel) -> str | None:
    """Why no other family is known that says this model with its dense layers; None if one is."""
    layers = moe_layers(model)
    if not edited_blocks(model):
        return "it helps where layers became dense"
    if len({layer.info.num_experts for layer in layers}) > 1:
        return "no family says different numbers of experts"
    if own_structures(model, layers) or any(layer.info.real_experts for layer in layers):
        return "no family says what router rows or edits of one's own lead to"
    if any("top_k" in one for one in differing_layers(model.config, layers).values()):
        return "its routers choose another number of experts than its config says"
    return _obstacle_of(model.config)


def _obstacle_of(config: Any) -> str | None:
    superset = SUPERSETS.get(config.model_type)
    if superset is None:
        known = ", ".join(SUPERSETS)
        return f"no family that says more is known for {config.model_type} (only for {known})"
    for name, possible in superset.only.items():
        value = getattr(config, name, possible[0])
        if value not in possible:
            return f"{superset.model_type} cannot say {name}={value}"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return f"{superset.model_type} rotates otherwise where partial_rotary_factor is not 1"
    read = {*superset.renamed, *superset.only, *superset.unread, *OWN_FIELDS, *_base_fields()}
    read |= AutoConfig.for_model(superset.model_type).to_dict().keys()
    if unknown := sorted(config.to_dict().keys() - read):
        return (
            f"what {', '.join(unknown)} of its config means to {superset.model_type} is not known"
        )
    return None


def _base_fields() -> set[str]:
    return {*PreTrainedConfig().to_dict(), "torch_dtype"}


def superset_of(config: Any) -> Any:
    """The other family's config of the same function; where `_obstacle_of` finds nothing."""
    superset = SUPERSETS[config.model_type]
    left_out = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    left_out |= {*superset.only, *superset.unread, *OWN_FIELDS}
    values: dict[str, Any] = {}
    for name, value in copy.deepcopy(config.to_dict()).items():
        if name not in left_out:
            values |= dict.fromkeys(superset.renamed.get(name, (name,)), value)
    return AutoConfig.for_model(superset.model_type, **values | superset.made(config))


@torch.no_grad()
def as_superset(model: PreTrainedModel) -> PreTrainedModel:
    """The model as one of the other family, with the same tensors and the same dense blocks.

    To be saved, not computed with: what is computed anew at loading has no values. Also of a model
    without weights.
    """
    superset, layers = SUPERSETS[model.config.model_type], moe_layers(model)
    config = superset_of(model.config)
    if layers:
        setattr(config, superset.count, layers[0].info.num_experts)
    other = meta_model(config)
    for name, block in edited_blocks(model).items():
        set_block(other, name, block)
    loaded = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    missing = [
        name for name in loaded.missing_keys if not any(part in name for part in superset.empty)
    ]
    if missing or loaded.unexpected_keys:
        raise RuntimeError(f"as {superset.model_type}: {[*missing, *loaded.unexpected_keys]}")
    reference = model.get_input_embeddings().get_parameter("weight")
    for name in loaded.missing_keys:
        path, _, key = name.rpartition(".")
        shape = other.get_parameter(name).shape
        setattr(other.get_submodule(path), key, nn.Parameter(reference.new_zeros(shape)))
    other.tie_weights()
    other.generation_config = model.generation_config
    return other
