"""How the layers of a model are built: each by its family's own class, from a config of its own."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP as DenseMLP

from moe_lab_vllm.form import Layer
from moe_lab_vllm.stand_ins import keep_rows


@dataclass(frozen=True)
class Family:
    """A family of vLLM's: its decoder layer, where its block is, and what its config calls things.

    width: the config's field for the hidden units of one expert.
    """

    decoder_layer: type[nn.Module]
    num_experts: str
    width: str = "moe_intermediate_size"
    block: str = "mlp"


class NoBlock(nn.Module):
    """In the place of a block that was dropped: adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def with_config(vllm_config: VllmConfig, hf_config: Any) -> VllmConfig:
    """A view of vllm_config whose model has this config; all else is shared, registries too."""
    view = copy.copy(vllm_config)
    view.model_config = copy.copy(vllm_config.model_config)
    view.model_config.hf_config = view.model_config.hf_text_config = hf_config
    return view


def build_layer(family: Family, layer: Layer, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """The family's decoder layer with the block that the form describes, weights still to come."""
    config, index = vllm_config.model_config.hf_config, int(prefix.rsplit(".", 1)[1])
    if layer.width is not None:
        return _dense_layer(family, layer.width, vllm_config, prefix, index)
    changes = {
        family.num_experts: layer.num_experts,
        family.width: shared_out(layer.expert_width),
        "num_experts_per_tok": layer.top_k,
    }
    own = _changed(config, {name: value for name, value in changes.items() if value is not None})
    built = _decoder_layer(family, with_config(vllm_config, own), prefix)
    block = getattr(built, family.block)
    if layer.expert_width is not None and getattr(block, "shared_experts", None) is not None:
        _keep_shared_width(block, config, vllm_config, prefix=f"{prefix}.{family.block}")
    if layer.rows is not None:
        keep_rows(block, layer)
    return built


def shared_out(width: int | None) -> int | None:
    """A width that all ranks can share: up to that, `loading.py` fills tensors up with zeros."""
    ranks = get_tensor_model_parallel_world_size()
    return None if width is None else -(-width // ranks) * ranks


def _dense_layer(
    family: Family, width: int, vllm_config: VllmConfig, prefix: str, index: int
) -> nn.Module:
    """A decoder layer with a dense MLP, of the family's own class where its config can say that."""
    config, ranks = vllm_config.model_config.hf_config, get_tensor_model_parallel_world_size()
    changes: dict[str, Any] = {"intermediate_size": shared_out(width) or ranks}
    if hasattr(config, "mlp_only_layers"):
        changes["mlp_only_layers"] = [index]
    elif hasattr(config, "first_k_dense_replace"):
        changes["first_k_dense_replace"] = index + 1
    else:
        # The smallest MoE block there can be; it goes again.
        changes |= {family.num_experts: ranks, family.width: ranks, "num_experts_per_tok": 1}
    built = _decoder_layer(family, with_config(vllm_config, _changed(config, changes)), prefix)
    path = f"{prefix}.{family.block}"
    if hasattr(getattr(built, family.block), "experts"):
        _unregister(f"{path}.experts")
        dense = DenseMLP(
            config.hidden_size,
            shared_out(width) or ranks,
            config.hidden_act,
            vllm_config.quant_config,
            prefix=path,
        )
        setattr(built, family.block, dense)
    if not width:
        setattr(built, family.block, NoBlock())
    return built


def _decoder_layer(family: Family, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Families differ in what they take; it is all in vllm_config."""
    offered = {
        "vllm_config": vllm_config,
        "config": vllm_config.model_config.hf_config,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "prefix": prefix,
    }
    taken = inspect.signature(family.decoder_layer).parameters
    return family.decoder_layer(**{name: offered[name] for name in taken if name in offered})


def _keep_shared_width(block: Any, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
    """Give the shared experts their width back, which the families derive from one expert's."""
    block.shared_experts = type(block.shared_experts)(
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
        hidden_act=config.hidden_act,
        quant_config=vllm_config.quant_config,
        reduce_results=False,
        prefix=f"{prefix}.shared_experts",
    )
    block.experts.shared_experts._layer = block.shared_experts


def _unregister(name: str) -> None:
    """Forget an experts module that vLLM's kernels would look up by its name."""
    registries = get_current_vllm_config().compilation_config
    del registries.static_forward_context[name]
    registries.static_all_moe_layers.remove(name)


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config
