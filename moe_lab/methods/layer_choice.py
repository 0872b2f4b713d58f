"""Which MoE layers the baselines work on: explicit ones, or the first by some order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from moe_lab.profile.layer import LayerStatistics
from moe_lab.types import LayerInfo, UserError


def check_layers(
    method: str,
    layers: str | Sequence[int],
    num_layers: int,
    names: Sequence[str],
    infos: Sequence[LayerInfo],
) -> None:
    """Refuse orders other than `names`, layers that are no MoE layers, and impossible numbers."""
    indices = [info.index for info in infos]
    if isinstance(layers, str):
        if layers not in names:
            raise UserError(
                f"method.layers={layers!r} does not exist for method={method}; there are "
                f"{', '.join(names)}, or an explicit list of decoder layers"
            )
        if layers != "all" and not 1 <= num_layers <= len(infos):
            raise UserError(
                f"condense.num_layers={num_layers}: the model has {len(infos)} MoE layers, and "
                f"method={method} works on 1 to {len(infos)} of them"
            )
    elif not layers or len(set(layers)) < len(layers):
        raise UserError(f"method.layers={list(layers)}: name one or more, each once")
    elif unknown := [index for index in layers if index not in indices]:
        raise UserError(
            f"method.layers names {unknown}, but the model's MoE layers are {indices} "
            "(true indices; dense layers count)"
        )


def example_layers(
    layers: str | Sequence[int], num_layers: int, infos: Sequence[LayerInfo]
) -> list[LayerInfo]:
    """As many layers as a plan will choose, before it is known which: explicit ones, or the last.

    The last say what a choice may cost: what stands before MoE layers is easier to say natively.
    """
    if isinstance(layers, str):
        return list(infos)[-num_layers:]
    return [info for info in infos if info.index in layers]


def choose_layers(
    layers: str | Sequence[int],
    num_layers: int,
    statistics: Sequence[LayerStatistics],
    cosine: str,
    seed: int = 0,
) -> tuple[int, ...]:
    """True indices of the layers in order of choice.

    cosine takes the most similar first: the layers whose "block" or "layer" (the argument
    `cosine`) changes the direction of the hidden state least (He et al. 2406.02500). Ties take
    the lower layer.
    """
    if not isinstance(layers, str):
        return tuple(layers)
    indices = [one.info.index for one in statistics]
    if layers == "cosine":
        mean = {one.info.index: one.mean_cosine(cosine) for one in statistics}
        indices.sort(key=lambda index: -mean[index])
    elif layers == "last":
        indices.reverse()
    elif layers == "random":
        random.Random(f"{seed}/layers").shuffle(indices)
    return tuple(indices if layers == "all" else indices[:num_layers])
