"""What a profile layer by layer takes at most, known from shapes alone: said before its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lab.models.layerwise import layers_read
from moe_lab.models.stream import ARGUMENT_BYTES
from moe_lab.profile.layer import NEURON_STATISTICS
from moe_lab.types import LayerInfo

DOUBLE = 8  # bytes of a sum
VECTORS = 24  # sums with a number for each expert, at most
LIBRARIES = 2**27  # what they take while they work
STATES = 4  # hidden states of a batch that a layer holds beside what it works on
SLOTS = 6  # of each token and chosen expert: in, out (as parts, joined), weighted, added (twice)
# And of each hidden unit, beside what goes in: gate, up, the gate's value, their product.
UNIT_SLOTS = 4
ROUTED = 8  # of each token and expert, in float64, while the router's sums are made


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of weights in the computing dtype: of the largest decoder layer, and outside of all.

    itemsize: of a number; widest: numbers of a token at most in a layer, beside its experts;
    eager_heads: heads whose attention is computed as a matrix of positions, 0 where it is not;
    converted: whether the files have another dtype.
    """

    layer: int
    outside: int
    itemsize: int
    widest: int
    eager_heads: int = 0
    converted: bool = False


@dataclass(frozen=True)
class ProfileRequest:
    """What of a profile decides its needs.

    batches: samples and tokens of each (of all groups, of one process); groups: how many;
    neurons: sums of hidden units, too; ahead: the next layer is filled meanwhile. cache: bytes of
    hidden states in memory; journal: whether there is one.
    """

    batches: Sequence[tuple[int, int]]
    groups: int = 1
    neurons: bool = False
    ahead: bool = True
    cache: int = 2**63
    journal: bool = True


@dataclass(frozen=True)
class Bounds:
    """Bytes of memory, beyond the process with its libraries, and of disk.

    layer: of weights of decoder layers; outside: of all other weights, and what libraries take
    while it works; states: hidden states that memory holds; forward: the largest batch in a layer;
    sums: of a layer's statistics. Of disk: result, which stays; scratch, while it works. weights,
    slots: what no way of computing does without, of weights and of the forward.
    """

    layer: int
    outside: int
    states: int
    forward: int
    sums: int
    result: int
    scratch: int
    weights: int
    slots: int

    @property
    def memory(self) -> int:
        """All of it, at most."""
        return self.layer + self.outside + self.states + self.forward + self.sums

    @property
    def least(self) -> int:
        """Memory below which it cannot be done."""
        return self.weights + self.slots

    @property
    def disk(self) -> int:
        """All of it."""
        return self.result + self.scratch

    def in_words(self) -> str:
        """For people, in GiB."""
        parts = {
            "decoder layers": self.layer, "other weights": self.outside,
            "hidden states": self.states, "a forward": self.forward, "sums": self.sums,
        }  # fmt: skip
        told = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return (
            f"{self.memory / 2**30:.2f} GiB of memory at most ({told}); "
            f"{self.disk / 2**30:.2f} of disk, of which {self.result / 2**30:.2f} stay"
        )


def bounds(layers: Sequence[LayerInfo], weights: WeightBytes, asked: ProfileRequest) -> Bounds:
    """What profiling these MoE layers takes at most."""
    hidden = max(layer.hidden_size for layer in layers)
    tokens = sum(rows * length for rows, length in asked.batches)
    states = tokens * hidden * weights.itemsize
    sums = [sums_of(layer, asked.neurons) for layer in layers]
    copies = asked.groups + 1 if asked.groups > 1 else 1  # each group, and all together
    held = min(states, asked.cache)
    result = copies * sum(sums)
    return Bounds(
        layer=int(weights.layer * (layers_read(weights.converted) + asked.ahead)),
        outside=weights.outside + LIBRARIES,
        states=held,
        forward=max(_forward(layers, weights, asked, *batch) for batch in asked.batches),
        sums=(asked.groups + 2) * max(sums),
        result=result,
        scratch=result + states - held + (2 * states if asked.journal else 0),
        weights=weights.layer + weights.outside,
        slots=max(_slots(layers, *batch) for batch in asked.batches) * hidden * weights.itemsize,
    )


def sums_of(layer: LayerInfo, neurons: bool = False) -> int:
    """Bytes of all sums of a layer."""
    experts = layer.num_experts
    numbers = experts * (VECTORS + layer.hidden_size + 2 * experts + layer.top_k) + VECTORS
    if neurons:
        units = experts * layer.expert_width + layer.shared_width
        numbers += len(NEURON_STATISTICS) * units
    return DOUBLE * numbers


def _forward(
    layers: Sequence[LayerInfo], weights: WeightBytes, asked: ProfileRequest, rows: int, length: int
) -> int:
    """One batch through the layer that takes most: what is alive at once is not all of it."""
    tokens, size = rows * length, weights.itemsize
    hidden = max(layer.hidden_size for layer in layers)
    slots = _slots(layers, rows, length)
    units = max(layer.expert_width for layer in layers)
    kept = units if asked.neurons else 0
    experts = slots * size * max(SLOTS * hidden + 2 * kept, hidden + UNIT_SLOTS * units)
    router = tokens * DOUBLE * ROUTED * max(layer.num_rows for layer in layers)
    # Outputs and hidden units that are counted; states around the block in float32.
    counted = hidden + kept
    counting = slots * size * 2 * counted + tokens * hidden * (2 * DOUBLE + 4 * 4)
    attention = tokens * weights.widest * size * 4
    scores = weights.eager_heads * rows * length**2 * (3 * size + 4)
    busiest = max(experts, counting + router, attention + scores)
    return tokens * hidden * size * STATES + _masks(weights, asked, rows, length) + busiest


def _slots(layers: Sequence[LayerInfo], rows: int, length: int) -> int:
    """Tokens times the experts that each is sent to."""
    return rows * length * max(layer.top_k for layer in layers)


def _masks(weights: WeightBytes, asked: ProfileRequest, rows: int, length: int) -> int:
    """Masks of positions by positions: those that are kept, one beside them, and what makes it.

    Where documents have no padding beside them there is none, unless attention is such a matrix.
    """
    if rows == 1 and not weights.eager_heads:
        return 0
    size = 2 * weights.itemsize if weights.eager_heads else 1  # of two kinds (sliding windows)
    kept = sum(rows * length**2 * size for rows, length in asked.batches)
    return min(kept, ARGUMENT_BYTES) + 2 * rows * length**2 * size
