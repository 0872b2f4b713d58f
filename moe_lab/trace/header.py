"""What a trace says of the model, the text and the run that it was recorded from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_lab.types import UserError

TRACE_FORMAT = 1  # the version of the file's columns and header
HEADER_KEY = b"moe_lab_trace"  # in the metadata of the Parquet schema
PRECISIONS = (16, 8, 4, 3, 2)  # bits of a weight
GROUP = 128  # weights that share a scale of 16 bits below 16 bits


@dataclass(frozen=True)
class TracedLayer:
    """One MoE layer: its true index in the model, and what an expert of it is.

    experts: those that exist; shared: whether shared experts stand beside them. parameters and
    stored_bytes: of one routed expert's own weights, without its router row, as the model holds
    them; of experts of several widths the widest.
    """

    index: int
    experts: int
    top_k: int
    shared: bool
    parameters: int
    stored_bytes: int

    def bytes_at(self, bits: int | None) -> int:
        """Of one expert at so many bits a weight, scales counted; None: as the model holds it."""
        if bits is None:
            return self.stored_bytes
        scales = 0 if bits >= max(PRECISIONS) else -(-self.parameters // GROUP) * 2
        return -(-self.parameters * bits // 8) + scales


@dataclass(frozen=True)
class TraceHeader:
    """What holds for all of a trace.

    layers: the MoE layers in the order in which they run; layers without experts are absent.
    resident_bytes: all of the model that is no routed expert. data: fingerprint of the prompts'
    tokens; tokenizer: sha256 digits of the tokenizer's files.
    """

    model: str
    family: str
    dtype: str
    layers: tuple[TracedLayer, ...]
    resident_bytes: int
    tokenizer: str
    data: str
    seed: int
    requests: int
    new_tokens: int
    lookahead: int
    batch_size: int
    access: str
    version: int = TRACE_FORMAT

    def to_json(self) -> dict[str, Any]:
        """As plain data; beside its values the bytes of an expert by precision, for other tools."""
        plain = asdict(self)
        for values, layer in zip(plain["layers"], self.layers, strict=True):
            values["expert_bytes"] = {str(bits): layer.bytes_at(bits) for bits in PRECISIONS}
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TraceHeader:
        """Of what `to_json` gave; UserError for another version, or values that are none."""
        if values.get("version") != TRACE_FORMAT:
            raise UserError(
                f"it is a trace of format {values.get('version')}, and this version reads "
                f"format {TRACE_FORMAT}: record it anew (trace=full)"
            )
        try:
            given = {name: values[name] for name in cls.__dataclass_fields__}
            return cls(**given | {"layers": tuple(map(_layer, given["layers"]))})
        except (KeyError, TypeError) as error:
            raise UserError(f"its header lacks what a trace says of itself: {error}") from error

    @property
    def num_experts(self) -> int:
        """The most experts that a layer has."""
        return max((layer.experts for layer in self.layers), default=0)

    def experts_bytes(self, bits: int | None = None) -> int:
        """Of all routed experts."""
        return sum(layer.experts * layer.bytes_at(bits) for layer in self.layers)


def _layer(values: Mapping[str, Any]) -> TracedLayer:
    return TracedLayer(**{name: values[name] for name in TracedLayer.__dataclass_fields__})


def widest_bytes(layers: Sequence[TracedLayer], bits: int | None) -> int:
    """Of the largest expert of these layers."""
    return max(layer.bytes_at(bits) for layer in layers)
