"""In which words a family's config says how wide experts and shared experts are: found by trying.

Models without weights are built with one field of the config changed after the other. Shared
experts may have a field of their own, or be as wide as a number of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from moe_lab.models.checkpoint import meta_model
from moe_lab.models.layers import COUNT_FIELDS, TOP_K_FIELDS, MoELayer, moe_layers
from moe_lab.models.opening import text_config
from moe_lab.types import LayerInfo

SHARED_TOO = "method.shared=true narrows them, too"
WORDS_OF_EXPERTS = ("expert", "moe")


@dataclass(frozen=True)
class Field:
    """One whole number of a config: where its part is, its name, its place in a list."""

    part: tuple[str, ...]
    name: str
    place: int | None
    value: int

    @property
    def title(self) -> str:
        """As a reader of config.json finds it."""
        return ".".join((*self.part, self.name))

    def changed(self, config: Any, value: int) -> Any:
        """A copy of the config in which this number is another one."""
        copied = copy.deepcopy(config)
        part = copied
        for name in self.part:
            part = getattr(part, name)
        if self.place is None:
            setattr(part, self.name, value)
        else:
            numbers = list(getattr(part, self.name))
            numbers[self.place] = value
            setattr(part, self.name, numbers)
        return copied


def config_with_widths(config: Any, layers: Sequence[MoELayer]) -> tuple[Any, str | None]:
    """The config whose model has experts and shared experts as wide as the widest of `layers`.

    Shared experts that its words cannot say get the next greater width that they can. Or what is
    in the way, in words.
    """
    wanted = max(layer.info.expert_width for layer in layers)
    built = _infos(config)
    if {info.expert_width for info in built} != {wanted}:
        before = max(info.expert_width for info in built)
        found = next(_with_width(config, before, wanted), None)
        if found is None:
            return None, f"no field of {config.model_type}'s config says how wide experts are"
        config = found
    return _with_shared(config, max(layer.info.shared_width for layer in layers), wanted)


def _with_width(config: Any, before: int, wanted: int) -> Iterator[Any]:
    """Configs whose model has experts of this width: with the first field that says it."""
    fields = [field for field in _fields(config) if field.value == before]
    fields.sort(key=lambda field: not _is_of_experts(field.name))
    for field in fields:
        changed = field.changed(config, wanted)
        if not _has(changed, lambda info: info.expert_width == wanted):
            continue
        # Names that only others read should not say another width.
        shapes = _shapes(changed)
        for other in fields:
            if other != field and _is_of_experts(other.name):
                more = other.changed(changed, wanted)
                changed = more if _shapes(more) == shapes else changed
        yield changed


def _with_shared(config: Any, wanted: int, width: int) -> tuple[Any, str | None]:
    """The config whose shared experts have `wanted` hidden units, or as few more as it can say.

    width: of one expert, of which theirs may be a multiple.
    """
    least = _shared_width(config)
    if least == wanted:
        return config, None
    found = [(least, config)] if least is not None and least > wanted else []
    for field in _fields(config):
        if "share" not in field.name:
            continue
        for value in {wanted, -(-wanted // width)}:
            changed = field.changed(config, value)
            made = _shared_width(changed)
            if made is not None and made >= wanted:
                found.append((made, changed))
    if not found:
        told = f"{config.model_type}'s config cannot say that shared experts are {wanted} wide"
        return None, f"{told} beside experts of {width} ({SHARED_TOO})"
    return min(found, key=lambda pair: pair[0])[1], None


def _shapes(config: Any) -> dict[str, Any] | None:
    """Of all tensors of the model of a config; None where none can be built of it."""
    try:
        return {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    except Exception:  # noqa: BLE001  # as below
        return None


def _has(config: Any, holds: Any) -> bool:
    infos = _infos(config)
    return bool(infos) and all(map(holds, infos))


def _shared_width(config: Any) -> int | None:
    """The width of the shared experts of all layers of the model of a config; None for several."""
    widths = {info.shared_width for info in _infos(config)}
    return widths.pop() if len(widths) == 1 else None


def _infos(config: Any) -> list[LayerInfo]:
    """The MoE layers of the model of a config; none where no model can be built of it."""
    try:
        model: PreTrainedModel = meta_model(config)
        return [layer.info for layer in moe_layers(model)]
    except Exception:  # noqa: BLE001  # whatever a field with another value brings about
        return []


def _is_of_experts(name: str) -> bool:
    return "share" not in name and any(word in name for word in WORDS_OF_EXPERTS)


def _fields(config: Any) -> Iterator[Field]:
    """All whole numbers of the text model's config and its parts."""
    path: tuple[str, ...] = ()
    text = text_config(config)
    if text is not config:
        parts = ((name, getattr(config, name, None)) for name in config.sub_configs)
        path = next(((name,) for name, part in parts if part is text), ())
    for part in ((), *((name,) for name in text.sub_configs)):
        inner = getattr(text, part[0], None) if part else text
        for name, value in vars(inner).items() if inner is not None else ():
            if name in (*COUNT_FIELDS, *TOP_K_FIELDS):
                continue
            if type(value) is int:
                yield Field((*path, *part), name, None, value)
            elif isinstance(value, list) and value and all(type(one) is int for one in value):
                yield from (
                    Field((*path, *part), name, place, one) for place, one in enumerate(value)
                )
