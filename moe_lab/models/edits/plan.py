"""Plans: what happens to a model, written, read back, checked and carried out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lab.lookup import module_in, names_in
from moe_lab.models.edits.base import EDIT_KINDS, Edit
from moe_lab.models.edits.chain import Chain
from moe_lab.types import LayerInfo, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from moe_lab.models.layers import MoELayer, Standing

OF_NO_KIND = ("base", "chain", "plan")  # the files of this folder that are no kinds of edits


@dataclass(frozen=True)
class Plan:
    """What happens to a model: an edit per MoE layer, and what decided it.

    A layer may have several edits, which follow one another in the order of `edits`.

    layer_order and layer_divergence tell a search over layers in its order of choice; searched
    holds what that search knew of layers it did not choose (their experts and divergences).
    tensors: what edits need beside their text, by name: "layers.<index>.constants" [R, D] of a
    layer whose R removed experts are replaced by constants, in ascending order of the experts;
    "layers.<index>.permutation" [E, I] of one whose merged experts' hidden units were matched by
    what they compute (`merging.merge_experts`); those of narrower experts (`edits/narrow.py`), of
    refits (`edits/refit.py`) and of condensed units (`edits/condense_units.py`).
    """

    edits: tuple[Edit, ...]
    layer_order: tuple[int, ...] = ()
    layer_divergence: tuple[float, ...] = ()
    searched: tuple[Edit, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def edited(self) -> tuple[Edit, ...]:
        """The edits that change something."""
        return tuple(edit for edit in self.edits if edit.changes)

    def kinds(self) -> set[type[Edit]]:
        """The kinds of the edits that change something: their code decides what becomes of them."""
        return {type(edit) for edit in self.edited()}

    def chains(self) -> tuple[Chain, ...]:
        """The edits of each layer, layers in order of their first edit."""
        return chains_of(self.edits)

    def to_text(self) -> str:
        """The plan as JSON, one edit a line so that two plans can be diffed."""
        head: dict[str, Any] = dict(self.notes)
        if self.layer_order:
            head["layer_order"] = list(self.layer_order)
            head["layer_divergence"] = list(self.layer_divergence)
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        for key, edits in (("searched", self.searched), ("layers", self.edits)):
            rows = ",\n".join("    " + json.dumps(edit.to_json()) for edit in edits)
            lines.append(f'  "{key}": [\n{rows}\n  ],' if edits else f'  "{key}": [],')
        lines[-1] = lines[-1].rstrip(",")
        return "{\n" + "\n".join(lines) + "\n}\n"

    def write_tensors(self, path: Path) -> None:
        """Write the tensors, where there are any, beside the text at `path`, for `load` to find."""
        if self.tensors:
            from safetensors.torch import save_file

            tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, path.with_suffix(".safetensors"))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a file with the text of `to_text`, and the tensors beside it.

        Edits of kinds that are not known become `UnknownEdit`s, which cannot be carried out.
        """
        values = json.loads(path.read_text())
        beside = path.with_suffix(".safetensors")
        tensors = TensorsInFile(beside) if beside.is_file() else {}
        return cls(
            edits=tuple(read_edit(row) for row in values.pop("layers")),
            searched=tuple(read_edit(row) for row in values.pop("searched")),
            layer_order=tuple(values.pop("layer_order", ())),
            layer_divergence=tuple(values.pop("layer_divergence", ())),
            notes=values,
            tensors=tensors,
        )


class TensorsInFile(Mapping[str, "Tensor"]):
    """The tensors of a safetensors file by name, each read when it is asked for.

    Those of a plan may be as large as the model.
    """

    def __init__(self, path: Path):
        from safetensors import safe_open

        self.path = path
        with safe_open(path, "pt") as file:
            self._names = sorted(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


@dataclass(frozen=True)
class UnknownEdit(Edit):
    """An edit of a kind that is not known here: to be shown and written back, nothing else."""

    values: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def kind(self) -> str:  # type: ignore[override]  # of the edit, not of the class
        """As plan.json names it."""
        return str(self.values.get("edit"))

    @property
    def title(self) -> str:
        """The kind, and that it is not known."""
        return f"{self.kind} (not known here)"

    def to_json(self) -> dict[str, Any]:
        """What was read, unchanged."""
        return dict(self.values)

    def check(self, info: LayerInfo | None) -> None:
        """Refuse it: what it does is not known."""
        raise self._refusal()

    def restructure(self, standing: Standing, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Refuse it: what it does is not known."""
        raise self._refusal()

    def _refusal(self) -> UserError:
        return UserError(
            f"layer {self.index}: no edit of the kind {self.kind!r} with the fields "
            f"{sorted(self.values.keys() - {'index', 'name', 'edit'})} is known, so that it cannot "
            f"be carried out; known are {', '.join(sorted(EDIT_KINDS))}. Import the module that "
            "defines it first (a method that plans it does), or take the version of moe_lab that "
            "wrote the plan"
        )


def known_kinds() -> dict[str, type[Edit]]:
    """The kinds of edits by name: this folder's, and those of imported modules elsewhere."""
    _import_our_own()
    return EDIT_KINDS


@functools.cache
def _import_our_own() -> None:
    package = str(__package__)
    for name in names_in(package, OF_NO_KIND):
        module_in(package, name)


def read_edit(values: Mapping[str, Any]) -> Edit:
    """An edit from what `Edit.to_json` gave; an `UnknownEdit` where its kind, or a field, is."""
    kind = known_kinds().get(values["edit"])
    if kind is not None:
        try:
            return kind.from_json(values)
        except TypeError:  # fields of another version
            pass
    return UnknownEdit(values["index"], values["name"], dict(values))


def chains_of(edits: Iterable[Edit]) -> tuple[Chain, ...]:
    """The edits of each layer, layers in order of their first edit."""
    by_layer: dict[int, list[Edit]] = {}
    for edit in edits:
        by_layer.setdefault(edit.index, []).append(edit)
    return tuple(Chain(tuple(some)) for some in by_layer.values())


def check_plan(layers: Iterable[LayerInfo], edits: Iterable[Edit]) -> None:
    """Refuse a plan that names layers which are not there, or what an edit refuses of its layer."""
    known = {info.index: info for info in layers}
    for chain in chains_of(edits):
        if chain.index not in known:
            raise UserError(f"layer {chain.index} is no MoE layer; they are {sorted(known)}")
        info: LayerInfo | None = known[chain.index]
        for edit in chain.edits:
            edit.check(info)
            info = edit.left(info) if info else None


def apply_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Carry out a plan on a loaded model, in place; condensed layers become `DenseMLP`s.

    The model computes the edited function at once; `forms.py` finds the form in which
    stock transformers can hold it. Decoder layers behind a dropped one get new numbers.
    """
    _carry_out(model, plan.edited(), lambda edit, at: edit.apply(at, plan.tensors))


def apply_chain(model: PreTrainedModel, layer: MoELayer, chain: Chain, plan: Plan) -> None:
    """Carry out a plan's edits of one layer, whose weights alone need to be there, in place.

    A decoder layer that is to be removed stays, and keeps its number.
    """
    _carry_out_chain(model, layer, chain, lambda edit, at: edit.apply(at, plan.tensors))


def restructure_model(model: PreTrainedModel, edits: Iterable[Edit]) -> None:
    """Give a model, which needs no weights, the structure that the edits leave, in place."""
    edited = [edit for edit in edits if edit.changes]
    _carry_out(model, edited, lambda edit, at: edit.restructure(at, {}))


Step = Callable[[Edit, "MoELayer | nn.Module"], "nn.Module"]


def _carry_out(model: PreTrainedModel, edits: Iterable[Edit], step: Step) -> None:
    from moe_lab.models.depth import drop_decoders
    from moe_lab.models.layers import decoders_path, moe_layers
    from moe_lab.models.narrowing import fit_implementation

    layers = {layer.info.index: layer for layer in moe_layers(model)}
    removed: dict[int, str] = {}
    for chain in chains_of(edits):
        if chain.index not in layers:
            raise UserError(
                f"the plan edits layer {chain.index}, which is no MoE layer of this model; its MoE "
                f"layers are {sorted(layers)}"
            )
        _carry_out_chain(model, layers[chain.index], chain, step)
        if chain.removes_decoder:
            removed[chain.index] = layers[chain.index].info.name
    fit_implementation(model)
    if removed:
        drop_decoders(model, decoders_path(next(iter(removed.values()))), removed)


def _carry_out_chain(model: PreTrainedModel, layer: MoELayer, chain: Chain, step: Step) -> None:
    import torch

    from moe_lab.models.editing import set_block
    from moe_lab.models.layers import standing_at

    name = layer.info.name
    standing: Standing = layer
    for number, edit in enumerate(chain.edits):
        if number:
            standing = standing_at(model, name)
        with torch.no_grad():
            set_block(model, name, step(edit, standing))
