"""The values that pass between the stages: frozen, made to be read, JSON in and out.

Shape suffixes used throughout moe_lab:
    T tokens (valid ones only)    D hidden size          E routed experts
    K experts chosen per token    S = T*K token-expert pairs, sorted by expert
    I width of one expert         W width of a dense MLP  B sequences  L length
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


class UserError(ValueError):
    """A request that cannot be met: says what was asked, what is possible, how to ask for it."""


@dataclass(frozen=True)
class LayerInfo:
    """What one MoE layer is, without its weights.

    index: the decoder layer's true index in the model (dense layers counted);
    name: path of the MoE block in the model; groups, groups_used: of group-limited routers
    (1, 1 elsewhere); shared: whether shared experts stand beside the routed ones; obstacle: why
    the layer cannot become one dense gated MLP, None where it can. shared_width, expert_width:
    hidden units of the shared part (all shared experts together) and of one routed expert;
    num_decoders: decoder layers of the model, dense ones counted; family: its model type.
    expert_parameters, expert_bytes: what goes with one routed expert (weights, biases, its router
    row and whatever else is indexed by expert); model_parameters, model_bytes: of the whole model,
    tied ones once. Bytes are those of the model at hand; in `Checkpoint.layers()`, of its files.
    num_experts counts the router's rows: what a token can be sent to. real_experts: how many
    experts there are where rows lead to stand-ins or share an expert, 0 where each row has its own.
    """

    index: int
    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    shared: bool = False
    groups: int = 1
    groups_used: int = 1
    obstacle: str | None = None
    shared_width: int = 0
    expert_width: int = 0
    num_decoders: int = 0
    family: str = ""
    expert_parameters: int = 0
    expert_bytes: int = 0
    model_parameters: int = 0
    model_bytes: int = 0
    real_experts: int = 0


@dataclass(frozen=True)
class Routing:
    """One batch at one MoE layer, valid tokens only.

    x_TD: input of the MoE block; logits_TE: the router's; index_TK, weight_TK: exactly what the
    router hands to the experts. The chosen experts' outputs before their weights lie sorted by
    expert: y_SD, with expert_S, token_S (row in x_TD) and weight_S beside it.
    shared_gate_T: the sigmoid gate of the shared expert, None where it has none. Around the block:
    entering_TD and leaving_TD, input and output of the decoder layer; residual_TD, the state to
    which the MoE sublayer (norm and block) adds; routed_TD, what the routed experts add to it.
    """

    x_TD: Tensor
    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    y_SD: Tensor
    expert_S: Tensor
    token_S: Tensor
    weight_S: Tensor
    shared_gate_T: Tensor | None = None
    entering_TD: Tensor | None = None
    residual_TD: Tensor | None = None
    leaving_TD: Tensor | None = None
    routed_TD: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """Experts of one layer, or layers, in order of choice.

    divergence: after each choice, where the search looked at it; for experts the first one is that
    of the layer with no routed expert at all. For greedy_ppl it is a perplexity.
    """

    chosen: tuple[int, ...]
    divergence: tuple[float, ...] = ()


EditName = Literal["prune", "merge", "condense", "drop_layer", "drop_block", "keep"]
AlignName = Literal["none", "weights", "activations", "both"]
RouterName = Literal["all", "dominant", "mean", "sum"]
ReplacementName = Literal["nothing", "zero", "constant", "copy"]


@dataclass(frozen=True)
class Edit:
    """What happens to one MoE layer.

    prune: `kept` experts stay, the router loses the other rows; or keeps them, and a token sent to
    one gets what is put in as a `replacement`: zero, a constant vector of the plan's tensors, or a
    copy of the token itself, times the router's weight. merge: kept[i] becomes the average
    of the experts groups[i] (itself among them) with weights[i], after `align` has matched their
    hidden units to its own; `router` says which row it keeps. condense: the layer becomes one
    dense MLP, shared_gate * shared(x) + sum of gates[i] * expert[experts[i]](x); `divergence`
    holds the search's value after each choice, `widths` the hidden units of each part in that
    order (the shared part first where there is one). drop_layer: the MoE block adds nothing any
    more, attention and residual stay. drop_block: the whole decoder layer goes. keep: nothing.

    index is the decoder layer's in the model before any edit. scores: one per expert (prune,
    merge), or one of the layer (drop_layer, drop_block, keep); the plan's notes say of what.
    """

    index: int
    name: str
    edit: EditName
    kept: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    experts: tuple[int, ...] = ()
    gates: tuple[float, ...] = ()
    shared_gate: float = 1.0
    divergence: tuple[float, ...] = ()
    widths: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    align: AlignName = "weights"
    router: RouterName = "dominant"
    replacement: ReplacementName = "nothing"

    @property
    def keeps_rows(self) -> bool:
        """Whether the layer's router keeps all its rows while experts go."""
        return self.replacement != "nothing" or self.router == "all"

    def to_json(self) -> dict[str, Any]:
        """The edit with only the fields that its kind uses."""
        used = {
            "prune": ("kept", "scores"),
            "merge": ("kept", "groups", "weights", "align", "router", "scores"),
            "condense": ("experts", "gates", "shared_gate", "divergence", "widths"),
            "drop_layer": ("scores",),
            "drop_block": ("scores",),
            "keep": ("scores",),
        }[self.edit]
        if self.edit == "prune" and self.replacement != "nothing":
            used = ("kept", "replacement", "scores")
        values = {"index": self.index, "name": self.name, "edit": self.edit}
        return values | {key: _plain(getattr(self, key)) for key in used}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Edit:
        """The inverse of `to_json`."""
        return cls(**{key: _tuples(value) for key, value in values.items()})


@dataclass(frozen=True)
class Plan:
    """What happens to a model: an edit per MoE layer, and what decided it.

    layer_order and layer_divergence tell a search over layers in its order of choice; searched
    holds what that search knew of layers it did not choose (their experts and divergences).
    tensors: what edits need beside their text, by name: "layers.<index>.constants" [R, D] of a
    layer whose R removed experts are replaced by constants, in ascending order of the experts;
    "layers.<index>.permutation" [E, I] of one whose merged experts' hidden units were matched by
    what they compute (`merging.merge_experts`).
    """

    edits: tuple[Edit, ...]
    layer_order: tuple[int, ...] = ()
    layer_divergence: tuple[float, ...] = ()
    searched: tuple[Edit, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def edited(self) -> tuple[Edit, ...]:
        """The edits that change something."""
        return tuple(edit for edit in self.edits if edit.edit != "keep")

    def to_text(self) -> str:
        """The plan as JSON, one layer a line so that two plans can be diffed."""
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
        """Read a file with the text of `to_text`, and the tensors beside it."""
        values = json.loads(path.read_text())
        tensors = {}
        if path.with_suffix(".safetensors").is_file():
            from safetensors.torch import load_file

            tensors = load_file(path.with_suffix(".safetensors"))
        return cls(
            edits=tuple(Edit.from_json(row) for row in values.pop("layers")),
            searched=tuple(Edit.from_json(row) for row in values.pop("searched")),
            layer_order=tuple(values.pop("layer_order", ())),
            layer_divergence=tuple(values.pop("layer_divergence", ())),
            notes=values,
            tensors=tensors,
        )


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
