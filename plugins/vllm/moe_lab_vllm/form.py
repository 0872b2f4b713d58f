"""moe_lab's own form as it stands in a checkpoint's config.json, read and checked.

Only JSON is looked at here: what cannot be served is refused before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERSION = 2
STAND_INS = ("zero", "constant", "copy")
NUMBERS = ("num_experts", "rows", "expert_width", "top_k", "width")


@dataclass(frozen=True)
class Layer:
    """What one decoder layer has instead of the block that its family's config would build.

    num_experts: experts that exist; rows: router rows, where there are more; stand_in: what the
    rows without an expert lead to, None where each leads to an expert. expert_width, top_k: where
    they are not the config's. width: of the dense MLP that stands here instead, 0 for none at all.
    """

    num_experts: int | None = None
    rows: int | None = None
    stand_in: str | None = None
    expert_width: int | None = None
    top_k: int | None = None
    width: int | None = None

    @property
    def num_stand_ins(self) -> int:
        if self.stand_in is None or self.rows is None or self.num_experts is None:
            return 0
        return self.rows - self.num_experts


def read_form(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What stands under "moe_lab" in `config`, the whole config.json; ValueError if not ours."""
    form = config.get("moe_lab")
    if not isinstance(form, Mapping) or not isinstance(form.get("config"), Mapping):
        raise ValueError(
            'this config.json has the model_type "moe_lab" but no "moe_lab" with the family\'s '
            '"config" in it: was it written by moe_lab, and is it whole?'
        )
    if form.get("version") == 3:
        raise ValueError(
            "this checkpoint has layers whose experts are not equally wide, or narrower shared "
            "experts (version 3 of moe_lab's own form), which moe_lab_vllm does not serve. "
            "method.padding=1 fills them up with zeros in their family's form, which vLLM serves "
            "by itself; method.widths=by_layer makes experts equally wide; moe_lab.load reads it"
        )
    if form.get("version") == 4:
        raise ValueError(
            "this checkpoint is packed in few bits in a way of moe_lab's own (version 4 of its "
            "form), which moe_lab_vllm does not serve. quantize=rtn quantize.bits=4 of a model in "
            "its family's form is compressed-tensors', which vLLM serves by itself; moe_lab.load "
            "reads it"
        )
    if form.get("version") != VERSION:
        raise ValueError(
            f"this checkpoint has version {form.get('version')} of moe_lab's own form, and this "
            f"moe_lab_vllm reads version {VERSION}: install the moe_lab_vllm of the moe_lab that "
            "wrote it, or save it again with moe_lab.load and save_checkpoint"
        )
    return form


def read_layers(form: Mapping[str, Any]) -> dict[int, Layer]:
    """The layers that the form lists, by their index; ValueError for what is not served."""
    layers = form["layers"]
    return {int(index): _layer(index, layers[index]) for index in sorted(layers, key=int)}


def _layer(index: str, told: Mapping[str, Any]) -> Layer:
    known = (*NUMBERS, "stand_in")
    if unknown := sorted(set(told) - set(known)):
        raise ValueError(
            f"layer {index} of this checkpoint says {', '.join(unknown)}, which moe_lab_vllm does "
            f"not serve (it serves {', '.join(known)}): use moe_lab.load"
        )
    for name in NUMBERS:
        value = told.get(name)
        if value is not None and (type(value) is not int or value < (name != "width")):
            raise ValueError(f"layer {index} of this checkpoint says {name} {value!r}: no number")
    layer = Layer(**told)
    if layer.width is not None and len(told) > 1:
        raise ValueError(f"layer {index} of this checkpoint is both dense and not: {dict(told)}")
    if layer.stand_in not in (None, *STAND_INS):
        raise ValueError(
            f"layer {index} of this checkpoint has {layer.stand_in!r} in the place of removed "
            f"experts, moe_lab_vllm knows {', '.join(STAND_INS)}: use moe_lab.load"
        )
    if layer.rows is not None and (layer.num_experts is None or layer.rows <= layer.num_experts):
        raise ValueError(f"layer {index} of this checkpoint needs no rows: {dict(told)}")
    if layer.stand_in is not None and layer.rows is None:
        raise ValueError(f"layer {index} of this checkpoint has stand-ins without rows")
    return layer
