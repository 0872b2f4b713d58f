"""The measured part of a forecast: what no shape says, as `experiments/bench/costs.py` fitted it.

Memory of a piece of work is what shapes say of it (weights, gradients, cached states) and a sum of
parts, each so many times the bytes of one (`parts_of_forward`). Time on a processor is operations
by a rate, and so much for each expert that is called.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_lab.forecast.shape import DecoderShape, ModelShape
from moe_lab.forecast.work import Text

FLOAT = 4.0  # bytes of a number in float32
FILE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class Costs:
    """memory: by work and part; seconds: by work, of "flops" and "calls"; machine: where, when."""

    memory: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, Mapping[str, float]]
    machine: Mapping[str, str]
    process_bytes: float
    copy_rate: float

    def bytes_of(self, work: str, parts: Mapping[str, float]) -> float:
        """What a piece of work takes beside what its shapes say."""
        weights = self.memory.get(work, {})
        constant = weights.get("constant", 0.0)
        return constant + sum(weights.get(name, 0.0) * size for name, size in parts.items())

    def seconds_of(self, work: str, counts: Mapping[str, float]) -> float:
        """Seconds of this processor, one thread."""
        rates = self.seconds.get(work, {})
        return rates.get("constant", 0.0) + sum(
            rates.get(name, 0.0) * count for name, count in counts.items()
        )


@functools.cache
def measured_costs() -> Costs:
    """What is shipped."""
    return Costs(**json.loads(FILE.read_text(encoding="utf-8")))


def parts_of_forward(shape: ModelShape, text: Text) -> dict[str, float]:
    """Bytes of what the largest forward over a text has in its largest layer, in float32.

    Also of a model of two bytes a number, with which a processor works in float32. states: a
    hidden state of each token; given: what the chosen experts give; routed: what they get, have
    within and give; wide: the widest that a projection gives; attention: the weights of all heads;
    logits.
    """
    tokens = text.at_once
    return {
        "states": FLOAT * tokens * shape.hidden_size,
        "given": FLOAT * tokens * shape.hidden_size * max(one.top_k for one in shape.decoders),
        "routed": FLOAT * tokens * max(_routed(one, shape) for one in shape.decoders),
        "wide": FLOAT * tokens * max(one.width for one in shape.decoders),
        "attention": FLOAT * tokens * text.longest * max(one.heads for one in shape.decoders),
        "logits": FLOAT * tokens * shape.vocabulary,
    }


def _routed(decoder: DecoderShape, shape: ModelShape) -> float:
    return decoder.top_k * (shape.hidden_size + 2.0 * decoder.expert_width)


def saved_parts(shape: ModelShape, text: Text, first: int) -> dict[str, float]:
    """Bytes of what all layers from `first` on keep for a backward pass over a text, in float32."""
    behind, tokens = shape.decoders[first:], text.at_once
    return {
        "saved_states": FLOAT * tokens * shape.hidden_size * len(behind),
        "saved_routed": FLOAT * tokens * sum(_routed(one, shape) for one in behind),
        "saved_attention": FLOAT * tokens * text.longest * sum(one.heads for one in behind),
        "logits": FLOAT * tokens * shape.vocabulary,
    }


def calls_of(shape: ModelShape, text: Text) -> float:
    """How often an expert is called in one pass over a text, each alone as a loop calls it."""
    each = max(text.num_tokens / max(1, text.num_batches), 1)
    one = sum(min(layer.num_experts, each * layer.top_k) + 1 for layer in shape.decoders)
    return one * text.num_batches
