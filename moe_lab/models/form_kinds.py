"""What is unusual about a checkpoint's form, in words: read from its config.json and its source's.

Whether an engine serves a checkpoint hangs on its family and on this. The words are named here
alone: docs/serving.md, report.json and model cards say them, and look up by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_lab.models.layers import COUNT_FIELDS, TOP_K_FIELDS
from moe_lab.models.own_config import OWN, family_values, is_own_form

NATIVE, OWN_FORM = "native", "own form"
# What each word of a form means; a form is NATIVE or OWN_FORM, and what is unusual about it.
FEATURES = {
    "of another family": "saved as a family that computes the same (`condense.convert`)",
    "fewer experts": "every MoE layer has as many experts, and fewer than the source's",
    "fewer layers": "whole decoder layers are gone",
    "fewer experts per token": "the router chooses fewer experts",
    "dense layers": "some layers are dense MLPs where the source has experts",
    "no MLP": "some layers add nothing where the source has experts",
    "twins": "layers are filled up with copies of their experts",
    "unequal experts": "layers have different numbers of experts",
    "shared rows": "several rows of a router lead to one expert",
    "zero stand-ins": "router rows lead to nothing",
    "constant stand-ins": "router rows lead to a constant",
    "copy stand-ins": "router rows lead to the token itself",
    "narrower experts": "the experts of some layers have fewer hidden units",
    "experts of different widths": "experts of one layer have different numbers of hidden units",
    "narrower shared experts": "the shared experts of some layers have fewer hidden units",
    "unequal experts per token": "the routers of some layers choose another number of experts",
    "skipped experts": "a rule leaves out some of a token's experts",
    "factorised experts": "the experts' matrices are computed from factors",
    "another's structure": "what an edit of one's own wrote down",
}
OWN_FEATURES = {"skip": "skipped experts", "factorize": "factorised experts"}  # by kind of edit
# What configs call the width of experts; of some also that of dense layers, which only grow.
WIDTH_FIELDS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
LISTS_OF_DENSE = ("mlp_only_layers", "mlp_layer_types", "first_k_dense_replace", "num_dense_layers")


def family_named(config: Mapping[str, Any]) -> str:
    """The model type of a config.json; of our own form that of the family."""
    return str(family_values(config).get("model_type"))


def form_kind(config: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """NATIVE or OWN_FORM, and which FEATURES a checkpoint has that its source has not.

    config, source: the config.json of each, as it lies there.
    """
    values = family_values(config)
    own: Mapping[str, Any] | None = values[OWN]["layers"] if is_own_form(values) else None
    found = {*_of_config(_text(config), _text(source), own is not None)}
    if family_named(config) != family_named(source):
        found.add("of another family")
    for layer in (own or {}).values():
        found |= {*_of_layer(layer, _text(config))}
    if own and len({one["num_experts"] for one in own.values() if "num_experts" in one}) > 1:
        found.add("unequal experts")
    words = [NATIVE if own is None else OWN_FORM, *(name for name in FEATURES if name in found)]
    return ", ".join(words)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that says what its decoder layers are."""
    values = family_values(config)
    text: Mapping[str, Any] | None = values.get("text_config")
    return text or values


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _of_config(config: Mapping[str, Any], source: Mapping[str, Any], own: bool) -> Iterator[str]:
    """What the family's config itself says; own: of a layer's experts something else is said."""
    if not own and _first(config, COUNT_FIELDS) < _first(source, COUNT_FIELDS):
        yield "fewer experts"
    if _first(config, TOP_K_FIELDS) < _first(source, TOP_K_FIELDS):
        yield "fewer experts per token"
    if _first(config, ("num_hidden_layers",)) < _first(source, ("num_hidden_layers",)):
        yield "fewer layers"
    if _num_dense(config) > _num_dense(source):
        yield "dense layers"
    if "distinct_experts" in config:
        yield "twins"
    if any(_first(config, (name,)) < _first(source, (name,)) for name in WIDTH_FIELDS):
        yield "narrower experts"


def _num_dense(config: Mapping[str, Any]) -> int:
    """How many layers a config names as dense, in whichever way."""
    for name in LISTS_OF_DENSE:
        value = config.get(name)
        if isinstance(value, list):
            return sum(one == "dense" if isinstance(one, str) else 1 for one in value)
        if isinstance(value, int):
            return value
    return 0


def _of_layer(layer: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """What our own form says of a layer."""
    if "width" in layer:
        yield "dense layers" if layer["width"] else "no MLP"
    if "rows" in layer:
        yield f"{layer['stand_in']} stand-ins" if layer.get("stand_in") else "shared rows"
    elif "num_experts" in layer and layer["num_experts"] != _first(config, COUNT_FIELDS):
        yield "unequal experts"
    if "expert_width" in layer:
        yield "narrower experts"
    if "expert_widths" in layer:
        yield "experts of different widths"
    if "shared_width" in layer:
        yield "narrower shared experts"
    if "top_k" in layer:
        yield "unequal experts per token"
    for kind in layer.get("own", {}):
        yield OWN_FEATURES.get(kind, "another's structure")
