"""In which form an edited model is saved: its family's own where that can say it, else ours.

Found on models without weights, so that it is known before any work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.editing import edited_blocks, width_of
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import restructure_model
from moe_lab.models.layers import (
    COUNT_FIELDS,
    MoELayer,
    by_expert,
    is_gated_mlp,
    layer_index,
    moe_layers,
    num_parameters,
)
from moe_lab.models.own_form import own_config, own_structures
from moe_lab.models.remapped import RemappedExperts
from moe_lab.models.routers import takes_twins

PADDING = 0.01  # the largest share of a model's parameters that may be zeros, unless it is given
DENSE_WIDTHS = ("dense_intermediate_size", "prefix_dense_intermediate_size", "intermediate_size")


@dataclass(frozen=True)
class Form:
    """How an edited model is saved.

    stock: whether stock transformers can load it; reason: which form and why, with the option that
    changes it; plain: whether it is the family's own without any zeros. num_experts: to how many
    each layer's are filled up with twins, None where they stay as they are; repeated: the
    parameters that these add.
    """

    stock: bool
    reason: str
    config: Any
    plain: bool = False
    num_experts: int | None = None
    repeated: int = 0

    def to_json(self) -> dict[str, Any]:
        """What a stage keeps beside the checkpoint."""
        return {"stock": self.stock, "reason": self.reason, "repeated_parameters": self.repeated}


def form_of(config: Any, edits: Iterable[Edit], padding: float | None = None) -> Form:
    """The form in which a model of `config` would be saved after `edits`, found without weights.

    padding: see `save`. Raises UserError for blocks that cannot be dropped from this family.
    """
    model = meta_model(config)
    restructure_model(model, edits)
    return choose_form(model, padding_limit(config, padding))


def padding_limit(config: Any, padding: float | None) -> float:
    """The largest share of zeros: as given, else as at the source, else PADDING."""
    if padding is not None:
        return padding
    asked: float = (getattr(config, "moe_lab", None) or {}).get("padding", PADDING)
    return asked


def choose_form(model: PreTrainedModel, padding: float, twins: float = 0.0) -> Form:
    """The family's own form where it can say the model with few enough zeros, else ours."""
    layers, edited = moe_layers(model), edited_blocks(model)
    own = own_structures(model, layers)
    config, obstacle = _native_config(model, layers, edited, own)
    placed = any(layer.info.real_experts for layer in layers)
    if len(counts := _counts(layers)) > 1 and not placed and not own:
        form, obstacle = _with_twins(model, layers, edited, twins, max(counts), obstacle)
        if form:
            return form
    elif not obstacle and not (obstacle := _misfit(model, built := meta_model(config), edited)):
        names = sorted(dense_names(model) | set(edited)) if edited else []
        ours = [model.get_submodule(name) for name in names]
        theirs = [built.get_submodule(name) for name in names]
        zeros = sum(map(num_parameters, theirs)) - sum(map(num_parameters, ours))
        if not zeros:
            return Form(True, "in the family's own form, without padding", config, plain=True)
        widths = " and ".join(str(width) for width in sorted(set(map(width_of, ours))))
        share = zeros / num_parameters(model)
        how = f"dense layers {widths} wide, padded with zeros to {width_of(theirs[0])}: {share:.2%}"
        if share <= padding:
            reason = f"{how} more parameters (method.padding=0 keeps the exact sizes)"
            return Form(True, f"in the family's own form, {reason}", config)
        obstacle = (
            f"the family's would have {how} more parameters, and method.padding={padding:g} is "
            "the largest share that may be added"
        )
    reason = f"in moe_lab's own form, which stock transformers cannot load: {obstacle}"
    return Form(False, reason, own_config(model, layers, edited, padding))


def _native_config(
    model: PreTrainedModel,
    layers: list[MoELayer],
    edited: dict[str, nn.Module],
    own: dict[int, dict[str, Any]],
) -> tuple[Any, str | None]:
    """The config with which the family itself builds this model, and what is in the way."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "moe_lab"):
        del config.moe_lab
    if placed := [layer for layer in layers if layer.info.real_experts]:
        return None, _remapped_obstacle(placed, config.model_type)
    if own:
        kinds = ", ".join(sorted({kind for written in own.values() for kind in written}))
        where = f"layers {sorted(own)} have a structure of the edit {kinds}"
        return None, f"{where}, which {config.model_type} cannot say"
    counts = _counts(layers)
    if len(counts) > 1:
        numbers = " and ".join(map(str, counts))
        return None, f"layers have {numbers} experts, {config.model_type} has one number for all"
    for count in counts:
        set_num_experts(config, count)
    native = config_with_dense(config, edited)
    indices = sorted(layer_index(name) for name in edited)
    return (
        native,
        None if native else f"{config.model_type} cannot say that layers {indices} are dense",
    )


def _misfit(model: PreTrainedModel, built: PreTrainedModel, edited: Iterable[str]) -> str | None:
    """What the family's config would build otherwise, beside dense blocks, which may be wider."""
    theirs, dense = built.state_dict(), dense_names(model) | {*edited}
    for key, tensor in model.state_dict().items():
        if any(key.startswith(f"{name}.") for name in dense):
            continue
        shape = tuple(theirs[key].shape) if key in theirs else None
        if shape != tuple(tensor.shape):
            family = getattr(built.config, "model_type", "")
            return f"by its config {family} would give {key} the shape {shape}, not the model's own"
    return None


def _remapped_obstacle(layers: list[MoELayer], family: str) -> str:
    indices = [layer.info.index for layer in layers]
    experts = [layer.experts for layer in layers]
    stand_ins = {one.stand_in for one in experts if isinstance(one, RemappedExperts)}
    leads, options = [], []
    if kinds := sorted(kind for kind in stand_ins if kind is not None):
        leads.append(f"to what stands in for removed experts ({', '.join(kinds)})")
        options.append("method.replacement=nothing removes these rows too")
    if None in stand_ins:
        leads.append("several to one merged expert")
        options.append("method.router=dominant keeps one row for each")
    return (
        f"router rows of layers {indices} lead {' and '.join(leads)}, which {family} cannot say "
        f"({'; '.join(options)})"
    )


def _counts(layers: list[MoELayer]) -> list[int]:
    return sorted({layer.info.num_experts for layer in layers})


def _with_twins(
    model: PreTrainedModel,
    layers: list[MoELayer],
    edited: dict[str, nn.Module],
    limit: float,
    size: int,
    obstacle: str | None,
) -> tuple[Form | None, str | None]:
    """The family's form with all layers filled up to `size` experts, or what is in the way."""
    if not limit or edited or not all(map(takes_twins, layers)):
        return None, obstacle
    added = 0
    for layer in layers:
        tensors = [t for *_, t, _ in by_expert(layer) if isinstance(t, nn.Parameter)]
        per_expert = sum(t.numel() // layer.info.num_experts for t in tensors)
        added += (size - layer.info.num_experts) * per_expert
    share = added / num_parameters(model)
    how = f"every layer filled up to {size} experts with twins, which change nothing"
    if share > limit:
        more = f"{how}, would have {share:.1%} more parameters (finetune.twins={limit:g})"
        return None, f"{obstacle}; the family's own form, {more}"
    config = copy.deepcopy(model.config)
    if hasattr(config, "moe_lab"):
        del config.moe_lab
    set_num_experts(config, size)
    config.distinct_experts = {str(one.info.index): one.info.num_experts for one in layers}
    reason = (
        f"in the family's own form: {how}: {share:.1%} more parameters (finetune.twins=0: none)"
    )
    return Form(True, reason, config, num_experts=size, repeated=added), obstacle


def set_num_experts(config: Any, count: int) -> None:
    """Write the number of routed experts under each name that this config or a part of it knows."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for field in COUNT_FIELDS:
            if isinstance(getattr(part, field, None), int):
                setattr(part, field, count)


def config_with_dense(config: Any, dense: dict[str, nn.Module]) -> Any | None:
    """The config with which the family itself builds these dense layers, or None.

    Tried on a model without weights: every other layer must come out as it was.
    """
    if not dense:
        return config
    model = meta_model(config)
    moe = {layer.info.index for layer in moe_layers(model)}
    condensed = {layer_index(name) for name in dense}
    all_dense = set(range(config.num_hidden_layers)) - moe | condensed
    wanted = copy.deepcopy(config)
    if not _list_dense(wanted, sorted(all_dense)):
        return None
    field = next((name for name in DENSE_WIDTHS if hasattr(wanted, name)), None)
    if field is None:
        return None
    width = max(1, *(width_of(block) for block in dense.values()))
    setattr(wanted, field, max(width, getattr(wanted, field) if len(all_dense - condensed) else 0))
    built = meta_model(wanted)
    if {layer.info.index for layer in moe_layers(built)} != moe - condensed:
        return None
    return wanted if all(is_gated_mlp(built.get_submodule(name)) for name in dense) else None


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


def dense_names(model: PreTrainedModel) -> set[str]:
    """Paths of the dense MLPs that stand where other decoder layers have their MoE block."""
    tails = {"mlp", "feed_forward", "mixer", "block_sparse_moe"}
    return {n for n, m in model.named_modules() if n.split(".")[-1] in tails and is_gated_mlp(m)}
