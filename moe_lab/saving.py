"""Writing an edited model so that it can be read again, by stock transformers where possible.

Where the family's own config can say an edited structure, it is saved so. Otherwise `config.json`
carries it in "moe_lab", and it is replayed on the model before the weights come in.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from moe_lab.checkpoint import TEXT_FILES, meta_model, no_bars
from moe_lab.moe import (
    COUNT_FIELDS,
    DenseMLP,
    MoELayer,
    is_gated_mlp,
    moe_layers,
    prune_layer,
    set_block,
)

DENSE_WIDTHS = ("dense_intermediate_size", "prefix_dense_intermediate_size", "intermediate_size")


def apply_structure(model: nn.Module, structure: dict[str, Any]) -> None:
    """Give a model without weights the layers that `config.moe_lab` lists; idempotent."""
    layers = {str(layer.info.index): layer for layer in moe_layers(model)}
    for index, wanted in structure["layers"].items():
        layer = layers.get(index)
        if layer is None:
            continue
        if "width" in wanted:
            dense = DenseMLP(layer.info.hidden_size, wanted["width"], layer.experts.act_fn)
            set_block(model, layer.info.name, dense)
        elif wanted["num_experts"] < layer.info.num_experts:
            prune_layer(layer, range(wanted["num_experts"]))


def save(model: PreTrainedModel, folder: Path, source: Path) -> bool:
    """Write an edited model as a checkpoint; True where stock transformers can load it.

    Parameters are written in the dtype of the checkpoint at `source`, whose tokenizer comes along.
    The model itself is not changed except for its dtype and config.
    """
    dense = {name: module for name, module in model.named_modules() if type(module) is DenseMLP}
    layers = moe_layers(model)
    original = AutoConfig.from_pretrained(source, local_files_only=True)
    model.config = _saved_config(model, original, layers, dense)
    native = getattr(model.config, "moe_lab", None) is None
    if dense and native:
        _make_native(model, dense)
    _to_stored_dtype(model, original.dtype)
    # A model that came from fused files would be written fused; engines want per-expert names.
    model._weight_conversions = None
    with no_bars():
        model.save_pretrained(folder)
    _write_count_aliases(folder / "config.json", model.config)
    copy_text_files(source, folder)
    return native


def _saved_config(
    model: PreTrainedModel, original: Any, layers: list[MoELayer], dense: dict[str, DenseMLP]
) -> Any:
    counts = {layer.info.num_experts for layer in layers}
    uniform = copy.deepcopy(original)
    if hasattr(uniform, "moe_lab"):
        del uniform.moe_lab
    if len(counts) <= 1:
        for count in counts:
            set_num_experts(uniform, count)
        config = native_config(uniform, dense)
        if config is not None:
            return config
    ours = copy.deepcopy(original)
    ours.moe_lab = {"version": 1, "layers": {}}
    for layer in layers:
        ours.moe_lab["layers"][str(layer.info.index)] = {"num_experts": layer.info.num_experts}
    for name, module in dense.items():
        ours.moe_lab["layers"][str(_layer_index(name))] = {"width": module.gate_proj.out_features}
    return ours


def _layer_index(name: str) -> int:
    """The decoder layer in the path of one of its modules."""
    return int(next(part for part in reversed(name.split(".")) if part.isdigit()))


def set_num_experts(config: Any, count: int) -> None:
    """Write the number of routed experts under each name that this config knows."""
    for field in COUNT_FIELDS:
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, count)


def native_config(config: Any, dense: dict[str, DenseMLP]) -> Any | None:
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
    width = max(module.gate_proj.out_features for module in dense.values())
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
def _make_native(model: PreTrainedModel, dense: dict[str, DenseMLP]) -> None:
    """Replace our dense MLPs by the family's, zero-padded to its one width for dense layers."""
    built = meta_model(model.config)
    for name in _dense_names(model):
        source, target = model.get_submodule(name), built.get_submodule(name)
        reference = source.gate_proj.weight
        target.to_empty(device=reference.device).to(reference.dtype)
        for parameter in target.parameters():
            parameter.zero_()
        for projection in ("gate_proj", "up_proj", "down_proj"):
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
    for pattern in TEXT_FILES:
        for file in source.glob(pattern):
            if file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
