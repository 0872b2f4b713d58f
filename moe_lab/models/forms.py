"""In which form an edited model is saved: its family's own where that can say it, else ours.

Found on models without weights, so that it is known before any work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.condensing import edited_blocks, is_condensed_in_place, width_of
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import restructure_model
from moe_lab.models.hidden_units import unit_parameters
from moe_lab.models.layers import (
    COUNT_FIELDS,
    MoELayer,
    by_expert,
    layer_index,
    moe_layers,
    num_parameters,
)
from moe_lab.models.narrowing import GROUPED_BYTES, fits_grouped
from moe_lab.models.native_dense import config_with_dense, dense_names
from moe_lab.models.native_top_k import config_of_one_top_k, top_k_obstacle
from moe_lab.models.native_widths import SHARED_TOO, config_with_widths
from moe_lab.models.opening import text_config
from moe_lab.models.own_config import without_structures
from moe_lab.models.own_form import own_config, own_structures
from moe_lab.models.remapped import RemappedExperts
from moe_lab.models.routers import takes_twins
from moe_lab.models.superset import SUPERSET, SUPERSETS, as_superset, obstacle_of
from moe_lab.models.widths import widths_of

SEVERAL = 3  # of so many widths each is told
PADDING = 0.01  # the largest share of a model's parameters that may be zeros, unless it is given
IN_FAMILY = "in the family's own form, "


@dataclass(frozen=True)
class Form:
    """How an edited model is saved.

    stock: whether stock transformers can load it; reason: which form and why, with the option that
    changes it; plain: whether it is the family's own without any zeros. num_experts: to how many
    each layer's are filled up with twins; expert_width, shared_width: how wide narrower experts and
    shared experts are made with zeros; None where they stay as they are. repeated: the parameters
    that twins add; mtp, head: what became of the MTP layers and the head, in words.
    """

    stock: bool
    reason: str
    config: Any
    plain: bool = False
    num_experts: int | None = None
    expert_width: int | None = None
    shared_width: int | None = None
    repeated: int = 0
    mtp: str = ""
    head: str = ""

    def to_json(self) -> dict[str, Any]:
        """What a stage keeps beside the checkpoint."""
        told = {"stock": self.stock, "reason": self.reason, "repeated_parameters": self.repeated}
        words = {"mtp": self.mtp, "head": self.head}
        return told | {key: said for key, said in words.items() if said}


def form_of(
    config: Any, edits: Iterable[Edit], padding: float | None = None, convert: str | None = None
) -> Form:
    """The form in which a model of `config` would be saved after `edits`, found without weights.

    padding, convert: see `save`. Raises UserError for blocks that cannot be dropped from this
    family.
    """
    asked = (_Read(config.to_json_string(use_diff=False), config), tuple(edits), padding, convert)
    try:
        hash(asked)
    except TypeError:  # of one's own edits, whose fields may be anything
        return _form_of.__wrapped__(*asked)
    return _form_of(*asked)


@dataclass(frozen=True)
class _Read:
    """A config, which is another's equal where both say the same."""

    text: str
    config: Any = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=64)  # jobs of a sweep ask for the same again and again
def _form_of(
    read: _Read, edits: tuple[Edit, ...], padding: float | None, convert: str | None
) -> Form:
    model = meta_model(read.config)
    restructure_model(model, edits)
    return choose_form(model, padding_limit(read.config, padding), convert=convert)


def padding_limit(config: Any, padding: float | None) -> float:
    """The largest share of zeros: as given, else as at the source, else PADDING."""
    if padding is not None:
        return padding
    asked: float = (getattr(config, "moe_lab", None) or {}).get("padding", PADDING)
    return asked


def choose_form(
    model: PreTrainedModel, padding: float, twins: float = 0.0, convert: str | None = None
) -> Form:
    """The family's own form where it can say the model with few enough zeros, else ours.

    convert: superset, and a family that can say more is tried before ours.
    """
    form = _form_in_family(model, padding, twins)
    if form.stock or convert != SUPERSET:
        return form
    asked = f"method.convert={SUPERSET}"
    if obstacle := obstacle_of(model):
        return replace(form, reason=f"{form.reason}; {asked} changes nothing: {obstacle}")
    superset = SUPERSETS[model.config.model_type]
    other = _form_in_family(as_superset(model), padding)
    how = other.reason.removeprefix(IN_FAMILY)
    if not other.stock:
        return replace(form, reason=f"{form.reason}; as {superset.model_type} ({asked}): {how}")
    note = f"; {superset.rounding}" if superset.rounding else ""
    reason = f"as {superset.model_type} ({asked}), which computes the same{note}: {how}"
    return replace(other, reason=reason, plain=False)


def _form_in_family(model: PreTrainedModel, padding: float, twins: float = 0.0) -> Form:
    """The form without another family's help."""
    layers, edited = moe_layers(model), edited_blocks(model)
    own = own_structures(model, layers)
    config, obstacle = _native_config(model, layers, edited, own)
    placed = any(layer.info.real_experts for layer in layers)
    if len(counts := _counts(layers)) > 1 and not placed and not own:
        form, obstacle = _with_twins(model, layers, edited, twins, max(counts), obstacle)
        if form:
            return form
    elif not obstacle:
        form, obstacle = _padded(model, layers, edited, config, padding)
        if form:
            return form
    reason = f"in moe_lab's own form, which stock transformers cannot load: {obstacle}"
    return Form(False, reason, own_config(model, layers, edited, padding))


def _padded(
    model: PreTrainedModel,
    layers: list[MoELayer],
    edited: dict[str, nn.Module],
    config: Any,
    limit: float,
) -> tuple[Form | None, str | None]:
    """The form of this config, zeros wherever its model is wider, or that these are too many."""
    built = meta_model(config)
    zeros = num_parameters(built) - num_parameters(model)
    grouped = fits_grouped(built)
    note = "" if grouped else f"; {_on_eager(moe_layers(built))}"
    if not zeros:
        return Form(True, f"{IN_FAMILY}without padding{note}", config, plain=grouped), None
    share = zeros / num_parameters(model)
    how = f"{' and '.join(_filled_up(model, layers, edited, built))}: {share:.2%}"
    if share > limit:
        return None, (
            f"the family's would have {how} more parameters, and method.padding={limit:g} is the "
            f"largest share that may be added{_instead_of_zeros(layers, built)}"
        )
    reason = f"{how} more parameters (method.padding=0 keeps the exact sizes)"
    theirs = moe_layers(built)[0].info if layers else None
    widths = (theirs.expert_width, theirs.shared_width) if theirs else (None, None)
    return Form(True, f"{IN_FAMILY}{reason}{note}", config, False, None, *widths), None


def _instead_of_zeros(layers: list[MoELayer], built: PreTrainedModel) -> str:
    """What would need none for shared experts as wide as a number of experts, in words."""
    theirs = [layer.info for layer in moe_layers(built)][:1]
    ours = {layer.info.shared_width for layer in layers}
    if not theirs or ours == {theirs[0].shared_width}:
        return ""
    whole = " and ".join(map(str, sorted(ours)))
    return f"; widths that divide {whole} need no zeros, and {SHARED_TOO}"


def _on_eager(layers: list[MoELayer]) -> str:
    """That grouped products cannot compute these widths, in words."""
    width = layers[0].info.expert_width
    step = GROUPED_BYTES // layers[0].experts.down_proj.element_size()
    return (
        f"{width} hidden units are no multiple of {step}, so that config.json asks for "
        f"transformers' eager experts (ratio.round_to={step} keeps the faster ones)"
    )


def _filled_up(
    model: PreTrainedModel,
    layers: list[MoELayer],
    edited: dict[str, nn.Module],
    built: PreTrainedModel,
) -> Iterator[str]:
    """In words what has fewer hidden units in a model than in the one that is built for it."""
    of_experts = {width for one in layers for width in widths_of(one.experts)}
    of_shared = {one.info.shared_width for one in layers}
    names = sorted(dense_names(model) | set(edited)) if edited else []
    of_dense = {width_of(model.get_submodule(name)) for name in names}
    theirs = [layer.info for layer in moe_layers(built)][:1]
    dense = [width_of(built.get_submodule(name)) for name in names[:1]]
    for what, ours, width in (
        ("dense layers", of_dense, dense),
        ("experts", of_experts, [info.expert_width for info in theirs]),
        ("shared experts", of_shared, [info.shared_width for info in theirs]),
    ):
        if width and ours != {*width}:
            several = " and ".join(map(str, sorted(ours)))
            if len(ours) > SEVERAL:
                several = f"{min(ours)} to {max(ours)}"
            yield f"{what} {several} wide, padded with zeros to {width[0]}"


def _native_config(
    model: PreTrainedModel,
    layers: list[MoELayer],
    edited: dict[str, nn.Module],
    own: dict[int, dict[str, Any]],
) -> tuple[Any, str | None]:
    """The config with which the family itself builds this model, and what is in the way."""
    config = without_structures(model.config)
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
    config = config_of_one_top_k(config, layers)
    if told := top_k_obstacle(config, layers):
        return None, f"{told}, {config.model_type} has one number for all"
    for count in counts:
        set_num_experts(config, count)
    if layers:
        config, obstacle = config_with_widths(config, layers)
        if obstacle:
            return None, obstacle
    if kept := [name for name, block in edited.items() if is_condensed_in_place(block)]:
        where = f"layers {sorted(map(layer_index, kept))}"
        return None, f"{where} are no gated MLPs, which {config.model_type} has as dense layers"
    native, obstacle = config_with_dense(config, edited)
    return native, obstacle or _other_tensor(model, native, edited)


def _other_tensor(model: PreTrainedModel, config: Any, edited: dict[str, nn.Module]) -> str | None:
    """Which tensor is another one in the model that this config builds, and not just a wider one.

    Wider may be dense layers, and what holds the hidden units of experts and of shared experts.
    """
    built = meta_model(config)
    dense = tuple(f"{name}." for name in dense_names(model) | set(edited))
    wider = _of_hidden_units(model) | _of_hidden_units(built)
    ours, theirs = model.state_dict(), built.state_dict()
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(one[name].shape) if name in one else None for one in (ours, theirs)]
        if shapes[0] == shapes[1] or name.startswith(tuple(f"{one}." for one in edited)):
            continue
        if (name.startswith(dense) or name in wider) and _holds(shapes[1], shapes[0]):
            continue
        told = f"{name} is {shapes[0]} here, and with its config {shapes[1]}"
        return f"{config.model_type} cannot say it: {told}"
    return None


def _of_hidden_units(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that hold the hidden units of experts and of shared experts."""
    names = set[str]()
    paths = {id(module): path for path, module in model.named_modules()}
    tensors = {id(tensor): name for name, tensor in model.named_parameters()}
    for layer in moe_layers(model):
        names |= {tensors[id(one)] for one in unit_parameters(layer.experts).values()}
        if layer.shared is not None:
            path = paths[id(layer.shared)]
            names |= {f"{path}.{name}" for name, _ in layer.shared.named_parameters()}
    return names


def _holds(wider: tuple[int, ...] | None, shape: tuple[int, ...] | None) -> bool:
    """Whether a tensor of this shape fits into one that is wider in one dimension."""
    if wider is None or shape is None or len(wider) != len(shape):
        return False
    return all(one >= other for one, other in zip(wider, shape, strict=True))


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
    config = without_structures(model.config)
    set_num_experts(config, size)
    config.distinct_experts = {str(one.info.index): one.info.num_experts for one in layers}
    reason = (
        f"in the family's own form: {how}: {share:.1%} more parameters (finetune.twins=0: none)"
    )
    return Form(True, reason, config, num_experts=size, repeated=added), obstacle


def set_num_experts(config: Any, count: int) -> None:
    """Write the number of routed experts under each name that this config or a part of it knows."""
    text = text_config(config)
    for part in (text, *(getattr(text, name) for name in text.sub_configs)):
        for field in COUNT_FIELDS:
            if isinstance(getattr(part, field, None), int):
                setattr(part, field, count)
