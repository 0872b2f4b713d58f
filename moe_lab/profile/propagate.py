"""Statistics measured again behind the layers that are compressed already."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_lab.models.editing import copied_layer
from moe_lab.models.edits.base import Edit
from moe_lab.models.layers import standing_at
from moe_lab.models.narrowing import fit_implementation
from moe_lab.models.stream import LayerStream, States, swapped
from moe_lab.profile import collect
from moe_lab.profile.all_experts import AllExperts
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress

logger = logging.getLogger(__name__)
# What a plan says of its statistics, by whether they were propagated.
MEASURED = {False: "intact model", True: "re-measured behind compressed layers"}


def propagated(
    profile: Profile,
    edit_of: Callable[..., Edit | Sequence[Edit]],
    tensors: Mapping[str, Tensor] | None = None,
    experts_on: int | None = 0,
    neurons: bool = False,
) -> list[Edit]:
    """The edits that `edit_of` decides layer by layer, each behind those before it.

    Walks over the whole calibration set: the statistics of a layer are those of the model in which
    every earlier MoE layer is edited already. tensors: where `edit_of` puts what its edits need
    beside their text (`Plan.tensors`). experts_on: with how many documents, the first ones (None:
    all), `edit_of` gets a second argument, the layer's `AllExperts` on them; 0: with none it gets
    the statistics alone. It gives an edit, or several that follow one another. neurons: the
    statistics are also of hidden units.
    """
    stream = profile.open_stream()
    logger.info("statistics are measured again behind each compressed layer: each layer is "
                "computed twice on the whole calibration set")  # fmt: skip
    stream.cache.announce({"hidden states": stream.state_bytes()})
    states, edits = States(stream), []
    for layer in progress(profile.statistics, "compressing layer by layer"):
        index = layer.info.index
        states.move_to(index)
        with stream.layer(index):
            statistics = _measured(stream, states, index, neurons)
            statistics.info = layer.info
            if experts_on == 0:
                made = edit_of(statistics)
            else:
                with _opened(stream, states, index, experts_on) as experts:
                    made = edit_of(statistics, experts)
            some = [made] if isinstance(made, Edit) else list(made)
            with swapped(stream, index, edited_block(stream, index, some, tensors or {})):
                fit_implementation(stream.model)
                states.pass_through(index, functools.partial(stream.replay, index))
        edits += some
    return edits


@torch.no_grad()
def edited_block(
    stream: LayerStream, index: int, edits: Sequence[Edit], tensors: Mapping[str, Tensor]
) -> nn.Module | None:
    """A copy of a layer's block after its edits; None where they change nothing."""
    layer, block = stream.moe[index], None
    for edit in (edit for edit in edits if edit.changes):
        with swapped(stream, index, block):
            found = standing_at(stream.model, layer.info.name) if block else copied_layer(layer)
        block = edit.apply(found, tensors)
    return block


def _measured(
    stream: LayerStream, states: States, index: int, neurons: bool = False
) -> LayerStatistics:
    """The statistics of one layer, whose weights are in memory, on the states before it."""
    with collect.collecting(stream.model, neurons=neurons) as collection:
        for batch in range(stream.num_batches):
            with collection.batch(stream.valid[batch]):
                stream.replay(index, batch, states[batch])
    collection.check_finite(index)
    return collection.of(index)


@contextmanager
def _opened(
    stream: LayerStream, states: States, index: int, num_documents: int | None
) -> Iterator[AllExperts]:
    """All experts of one layer, whose weights are in memory, on the states before it."""
    opened, left = AllExperts(stream.moe[index], stream.cache), num_documents
    for batch, valid in enumerate(stream.valid):
        if left is not None:
            valid = valid & (torch.arange(len(valid), device=valid.device) < left)[:, None]
            left = max(0, left - len(valid))
        if valid.any():
            opened.add_batch(stream, batch, states[batch], valid)
    try:
        yield opened
    finally:
        opened.close()
