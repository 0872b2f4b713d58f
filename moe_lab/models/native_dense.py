"""In which words a family's config says which of its layers are dense: found by trying.

The model that a config builds is looked at without weights, as in `native_widths.py`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.condensing import is_gated, width_of
from moe_lab.models.depth import nature
from moe_lab.models.layers import decoder_path, is_gated_mlp, layer_index, moe_layers
from moe_lab.models.opening import text_config

DENSE_WIDTHS = ("dense_intermediate_size", "prefix_dense_intermediate_size", "intermediate_size")


def config_with_dense(config: Any, dense: dict[str, nn.Module]) -> tuple[Any, str | None]:
    """The config with which the family itself builds these dense layers, or what is in the way.

    Tried on a model without weights: all other layers, and all around these, must come out as they
    were, since some families do more than another MLP where a layer is dense.
    """
    if not dense:
        return config, None
    model = meta_model(config)
    moe = {layer.info.index for layer in moe_layers(model)}
    condensed = {layer_index(name) for name in dense}
    obstacle = f"{config.model_type} cannot say that layers {sorted(condensed)} are dense"
    wanted = copy.deepcopy(config)
    text = text_config(wanted)
    all_dense = set(range(text.num_hidden_layers)) - moe | condensed
    if not _list_dense(text, sorted(all_dense)):
        return None, obstacle
    field = next((name for name in DENSE_WIDTHS if hasattr(text, name)), None)
    if field is None:
        return None, obstacle
    width = max(1, *(width_of(block) for block in dense.values()))
    setattr(text, field, max(width, getattr(text, field) if len(all_dense - condensed) else 0))
    built = meta_model(wanted)
    if {layer.info.index for layer in moe_layers(built)} != moe - condensed:
        return None, obstacle
    for name, block in dense.items():
        activation = getattr(block, "act_fn", None)
        target = built.get_submodule(name)
        if not (is_gated(target, activation) if activation else is_gated_mlp(target)):
            return None, f"{obstacle}: its own dense layers are no gated MLPs like these"
        decoder, child = decoder_path(name), name[len(decoder_path(name)) + 1 :]
        around = (nature(each.get_submodule(decoder), child) for each in (model, built))
        if next(around) != next(around):
            return None, f"{obstacle}: its decoder layers would do something else around them"
    return wanted, None


def _list_dense(config: Any, dense: list[int]) -> bool:
    """Name the dense layers in whichever form this config has; False where it cannot."""
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers = dense
    elif getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = [
            "dense" if index in dense else "sparse" for index in range(config.num_hidden_layers)
        ]
    elif hasattr(config, "first_k_dense_replace") and dense == list(range(len(dense))):
        config.first_k_dense_replace = len(dense)
    elif hasattr(config, "num_dense_layers") and dense == list(range(len(dense))):
        config.num_dense_layers = len(dense)
    else:
        return False
    return True


def dense_names(model: nn.Module) -> set[str]:
    """Paths of the dense MLPs that stand where other decoder layers have their MoE block."""
    tails = {"mlp", "feed_forward", "mixer", "block_sparse_moe"}
    return {n for n, m in model.named_modules() if n.split(".")[-1] in tails and is_gated_mlp(m)}
