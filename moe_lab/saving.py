"""Writing an edited model so that it can be read again, by stock transformers where possible.

Where the family's own config can say an edited structure, it is saved so. Otherwise `config.json`
carries it in "moe_lab", and it is replayed on the model before the weights come in.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moe_lab.checkpoint import meta_model, no_bars, text_files
from moe_lab.editing import DenseMLP, NoMLP, apply_plan, no_mlp, prune_layer, set_block
from moe_lab.moe import COUNT_FIELDS, MoELayer, by_expert, is_gated_mlp, moe_layers, num_parameters
from moe_lab.routing import takes_twins, with_twins
from moe_lab.stand_ins import place
from moe_lab.types import Edit, Plan

logger = logging.getLogger(__name__)
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
    # Of what a merged expert is the average does not matter here, and averaging needs weights.
    shapes = [replace(e, edit="prune") if e.edit == "merge" else e for e in edits]
    apply_plan(model, Plan(tuple(shapes)))
    return _form(model, _limit(config, padding))


def apply_structure(model: nn.Module, structure: dict[str, Any]) -> None:
    """Give a model without weights the layers that `config.moe_lab` lists; idempotent."""
    layers = {str(layer.info.index): layer for layer in moe_layers(model)}
    for index, wanted in structure["layers"].items():
        layer = layers.get(index)
        if layer is None:
            continue
        if "width" in wanted:
            block = no_mlp(layer)
            if wanted["width"]:
                act = layer.experts.act_fn
                block = DenseMLP(layer.info.hidden_size, wanted["width"], act)
            set_block(model, layer.info.name, block)
        elif not layer.info.real_experts:
            _keep(layer, **wanted)


def _keep(
    layer: MoELayer, num_experts: int, rows: int | None = None, stand_in: str | None = None
) -> None:
    """Leave so many experts and router rows; where the rows lead comes in with the weights."""
    rows = rows or num_experts
    if rows < layer.info.num_experts:
        prune_layer(layer, range(rows))
        layer = replace(layer, info=replace(layer.info, num_experts=rows))
    if rows > num_experts:
        prune_layer(layer, range(num_experts), rows=False)
        like = layer.experts.down_proj
        constants = like.new_empty(rows - num_experts, layer.info.hidden_size)
        is_constant = stand_in == "constant"
        place(layer.experts, range(rows), stand_in, constants if is_constant else None)


def save(
    model: PreTrainedModel,
    folder: Path,
    source: Path,
    padding: float | None = None,
    twins: float = 0.0,
) -> Form:
    """Write an edited model as a checkpoint, in the form that is returned.

    Parameters are written in the dtype of the checkpoint at `source`, whose tokenizer comes along.
    padding: zeros make narrow dense layers as wide as the family's config has all of them, if that
    adds at most this share of the model's parameters; else the exact sizes are saved in our own
    form. None: as at `source` where it says so, else 0.01. twins: layers with fewer experts than
    others are filled up with copies of their own, where that changes nothing (as with one expert
    for each token) and adds at most this share; the config says how many were there before
    (`distinct_experts`). The model is not changed except for its dtype, its config and those two.
    """
    original = AutoConfig.from_pretrained(source, local_files_only=True)
    if hasattr(model.config, "distinct_experts"):  # of the source: its copies may be edited by now
        del model.config.distinct_experts
    form = _form(model, _limit(model.config, padding), twins)
    if not form.plain:
        logger.info("saving: %s", form.reason)
    edited = _edited_blocks(model)
    for layer in moe_layers(model) if form.num_experts else ():
        prune_layer(layer, with_twins(layer.info.num_experts, form.num_experts))
    model.config = form.config
    if edited and form.stock:
        _make_native(model, edited)
    _to_stored_dtype(model, original.dtype)
    # A model that came from fused files would be written fused; engines want per-expert names.
    model._weight_conversions = None
    with no_bars():
        model.save_pretrained(folder)
    _write_count_aliases(folder / "config.json", model.config)
    copy_text_files(source, folder)
    return form


def _limit(config: Any, padding: float | None) -> float:
    if padding is not None:
        return padding
    return (getattr(config, "moe_lab", None) or {}).get("padding", PADDING)


def _edited_blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m) in (DenseMLP, NoMLP)}


def _width(block: nn.Module) -> int:
    return 0 if type(block) is NoMLP else block.gate_proj.out_features


def _form(model: PreTrainedModel, padding: float, twins: float = 0.0) -> Form:
    """The family's own form where it can say the model with few enough zeros, else ours."""
    layers, edited = moe_layers(model), _edited_blocks(model)
    config, obstacle = _native_config(model, layers, edited)
    placed = any(layer.info.real_experts for layer in layers)
    if len(counts := _counts(layers)) > 1 and not placed:
        form, obstacle = _with_twins(model, layers, edited, twins, max(counts), obstacle)
        if form:
            return form
    elif not obstacle:
        built = meta_model(config)
        names = sorted(_dense_names(model) | set(edited)) if edited else []
        ours = [model.get_submodule(name) for name in names]
        theirs = [built.get_submodule(name) for name in names]
        zeros = sum(map(num_parameters, theirs)) - sum(map(num_parameters, ours))
        if not zeros:
            return Form(True, "in the family's own form, without padding", config, plain=True)
        widths = " and ".join(str(width) for width in sorted(set(map(_width, ours))))
        share = zeros / num_parameters(model)
        how = f"dense layers {widths} wide, padded with zeros to {_width(theirs[0])}: {share:.2%}"
        if share <= padding:
            reason = f"{how} more parameters (method.padding=0 keeps the exact sizes)"
            return Form(True, f"in the family's own form, {reason}", config)
        obstacle = (
            f"the family's would have {how} more parameters, and method.padding={padding:g} is "
            "the largest share that may be added"
        )
    reason = f"in moe_lab's own form, which stock transformers cannot load: {obstacle}"
    return Form(False, reason, _own_config(model, layers, edited, padding))


def _native_config(
    model: PreTrainedModel, layers: list[MoELayer], edited: dict[str, nn.Module]
) -> tuple[Any, str | None]:
    """The config with which the family itself builds this model, and what is in the way."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "moe_lab"):
        del config.moe_lab
    if placed := [layer for layer in layers if layer.info.real_experts]:
        return None, _placed_obstacle(placed, config.model_type)
    counts = _counts(layers)
    if len(counts) > 1:
        numbers = " and ".join(map(str, counts))
        return None, f"layers have {numbers} experts, {config.model_type} has one number for all"
    for count in counts:
        set_num_experts(config, count)
    found = native_config(config, edited)
    indices = sorted(_layer_index(name) for name in edited)
    return (
        found,
        None if found else f"{config.model_type} cannot say that layers {indices} are dense",
    )


def _placed_obstacle(layers: list[MoELayer], family: str) -> str:
    indices = [layer.info.index for layer in layers]
    stand_ins = {layer.experts.stand_in for layer in layers}
    leads, options = [], []
    if kinds := sorted(stand_ins - {None}):
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
    obstacle: str,
) -> tuple[Form | None, str]:
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


def _own_config(
    model: PreTrainedModel, layers: list[MoELayer], edited: dict[str, nn.Module], padding: float
) -> Any:
    config = copy.deepcopy(model.config)
    structure = {str(one.info.index): _experts_structure(one) for one in layers}
    structure |= {str(_layer_index(name)): {"width": _width(b)} for name, b in edited.items()}
    config.moe_lab = {"version": 1, "padding": padding, "layers": structure}
    return config


def _experts_structure(layer: MoELayer) -> dict[str, Any]:
    if not layer.info.real_experts:
        return {"num_experts": layer.info.num_experts}
    found = {"num_experts": layer.info.real_experts, "rows": layer.info.num_experts}
    stand_in = layer.experts.stand_in
    return found | ({"stand_in": stand_in} if stand_in else {})


def _layer_index(name: str) -> int:
    """The decoder layer in the path of one of its modules."""
    return int(next(part for part in reversed(name.split(".")) if part.isdigit()))


def set_num_experts(config: Any, count: int) -> None:
    """Write the number of routed experts under each name that this config knows."""
    for field in COUNT_FIELDS:
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, count)


def native_config(config: Any, dense: dict[str, nn.Module]) -> Any | None:
    """The config with which the family itself builds these dense layers, or None.

    Tried on a model without weights: every other layer must come out as it was.
    """
    if not dense:
        return config
    model = meta_model(config)
    moe = {layer.info.index for layer in moe_layers(model)}
    condensed = {_layer_index(name) for name in dense}
    all_dense = set(range(config.num_hidden_layers)) - moe | condensed
    wanted = copy.deepcopy(config)
    if not _list_dense(wanted, sorted(all_dense)):
        return None
    field = next((name for name in DENSE_WIDTHS if hasattr(wanted, name)), None)
    if field is None:
        return None
    width = max(1, *(_width(block) for block in dense.values()))
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


@torch.no_grad()
def _make_native(model: PreTrainedModel, edited: dict[str, nn.Module]) -> None:
    """Replace our dense MLPs by the family's, zero-padded to its one width for dense layers."""
    built = meta_model(model.config)
    reference = model.get_input_embeddings().weight
    for name in _dense_names(model) | set(edited):
        source, target = model.get_submodule(name), built.get_submodule(name)
        target.to_empty(device=reference.device).to(reference.dtype)
        for parameter in target.parameters():
            parameter.zero_()
        for projection in (
            ("gate_proj", "up_proj", "down_proj") if type(source) is not NoMLP else ()
        ):
            weight = getattr(source, projection).weight
            rows, columns = weight.shape
            getattr(target, projection).weight[:rows, :columns] = weight
            bias = getattr(getattr(source, projection), "bias", None)
            if bias is not None:
                getattr(target, projection).bias[:rows] = bias
        set_block(model, name, target)


def _dense_names(model: PreTrainedModel) -> set[str]:
    """Paths of the dense MLPs that stand where other decoder layers have their MoE block."""
    tails = {"mlp", "feed_forward", "mixer", "block_sparse_moe"}
    return {n for n, m in model.named_modules() if n.split(".")[-1] in tails and is_gated_mlp(m)}


def _to_stored_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    kept = (model._keep_in_fp32_modules or set()) | (model._keep_in_fp32_modules_strict or set())
    for name, parameter in model.named_parameters():
        if dtype and parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _write_count_aliases(path: Path, config: Any) -> None:
    # transformers 5 writes Qwen3-MoE's count as num_local_experts alone, 4.x reads num_experts.
    values = json.loads(path.read_text())
    written = [field for field in COUNT_FIELDS if field in values]
    for field in ("num_experts", "num_local_experts"):
        if written and field not in values and hasattr(config, field):
            values[field] = values[written[0]]
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def copy_text_files(source: Path, folder: Path) -> None:
    """Bring the tokenizer and generation files of a checkpoint along, byte for byte."""
    for file in text_files(source):
        shutil.copyfile(file, folder / file.name)
