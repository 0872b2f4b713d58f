"""An edited model in the form in which it is saved (`forms.py`): filled up and made native."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.condensing import edited_blocks
from moe_lab.models.editing import NoMLP, prune_layer, set_block
from moe_lab.models.forms import Form
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.narrowing import widen_shared
from moe_lab.models.native_dense import dense_names
from moe_lab.models.routers import with_twins
from moe_lab.models.superset import as_superset
from moe_lab.models.widths import fill_up, is_uneven


def in_form(model: PreTrainedModel, form: Form) -> PreTrainedModel:
    """The model with the config, the experts and the dense layers that its form has.

    Changed in place, also where it has no weights; another one where it becomes another family's.
    """
    edited = edited_blocks(model)
    for layer in moe_layers(model) if form.stock else ():
        fill_up_layer(layer, form)
    if form.config.model_type != model.config.model_type:
        model = as_superset(model)
    model.config = form.config
    if edited and form.stock:
        built = meta_model(model.config)
        for name in dense_names(model) | set(edited):
            set_block(model, name, native_block(model, name, built.get_submodule(name)))
    return model


def fill_up_layer(layer: MoELayer, form: Form) -> None:
    """Give a layer the experts that the form has, with twins, and make all as wide, in place."""
    if form.num_experts:
        prune_layer(layer, with_twins(layer.info.num_experts, form.num_experts))
    if form.expert_width not in (None, HiddenUnits(layer.experts).width) or is_uneven(
        layer.experts
    ):
        fill_up(layer.experts, form.expert_width or HiddenUnits(layer.experts).width)
    if form.shared_width not in (None, layer.info.shared_width):
        widen_shared(layer, form.shared_width)


@torch.no_grad()
def native_block(model: PreTrainedModel, name: str, target: nn.Module) -> nn.Module:
    """The dense MLP at `name` as the family's own, zero-padded to its width for dense layers.

    target: what the family builds there, without weights; it is what is returned.
    """
    source = model.get_submodule(name)
    reference = model.get_input_embeddings().get_parameter("weight")
    target.to_empty(device=reference.device).to(reference.dtype)
    for parameter in target.parameters():
        parameter.zero_()
    if type(source) is NoMLP:
        return target
    for projection in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(source, projection).weight
        rows, columns = weight.shape
        getattr(target, projection).weight[:rows, :columns] = weight
        bias = getattr(getattr(source, projection), "bias", None)
        if bias is not None:
            getattr(target, projection).bias[:rows] = bias
    return target
