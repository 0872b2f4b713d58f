"""How alike the experts of one layer are: in their weights, their router rows, and their outputs.

Each figure is a matrix [E, E] of cosines. Letters beside those of types.py: F, all numbers of one
expert in a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_lab.models.experts import Experts
from moe_lab.models.layers import MoELayer, by_expert, num_parameters
from moe_lab.models.stream import LayerStream
from moe_lab.profile.all_experts import AllExperts, ExpertSample
from moe_lab.progress import progress

logger = logging.getLogger(__name__)
CHUNK = 2**24  # numbers of all experts together that are held in float32 at a time


def of_model(stream: LayerStream, weights: bool, outputs: bool) -> dict[str, Tensor]:
    """The matrices of all MoE layers, as <layer index>/<kind>, each layer's weights read once.

    weights, outputs: whether those of `of_weights`, and of `of_outputs` on the stream's tokens.
    """
    if weights:
        numbers = sum(num_parameters(layer.experts) for layer in stream.moe.values())
        logger.info("diagnose: the weights of all experts are read, %.3g numbers", numbers)
    runner = ExpertSample(stream) if outputs else None
    matrices: dict[str, Tensor] = {}
    for index in progress(sorted(stream.moe), "diagnose"):
        with _opened(stream, runner, index) as experts:
            of_layer = of_weights(stream.moe[index]) if weights else {}
            if experts is not None:
                of_layer |= of_outputs(experts.chunks())
        matrices |= {f"{index}/{kind}": one.contiguous() for kind, one in of_layer.items()}
    return matrices


@contextmanager
def _opened(
    stream: LayerStream, runner: ExpertSample | None, index: int
) -> Iterator[AllExperts | None]:
    """The layer with its weights in memory: every expert's outputs, or None without a sample."""
    if runner is None:
        with stream.layer(index):
            yield None
        return
    with runner.open(index) as experts:
        yield experts


class Outputs(Protocol):
    """Some tokens: index_TK, their experts; outputs_ETD, what every expert makes of them."""

    @property
    def index_TK(self) -> Tensor: ...

    @property
    def outputs_ETD(self) -> Tensor: ...


@torch.no_grad()
def of_weights(layer: MoELayer) -> dict[str, Tensor]:
    """Cosines [E, E] of the experts' flattened weights, per matrix, and of their router rows.

    Keys: "gate" (where they have one), "up", "down", "router". Lo et al. (2406.18219 section 4.1):
    the plain cosine, which sees nothing of an expert that is another's with its hidden units in
    another order.
    """
    cosines = {name: cosine(weight_EF) for name, weight_EF in projections(layer.experts).items()}
    return cosines | {"router": cosine(router_rows(layer))}


@torch.no_grad()
def of_outputs(chunks: Iterable[Outputs]) -> dict[str, Tensor]:
    """What all experts' outputs on the same tokens have in common.

    "output", [E, E]: the mean over tokens of the cosine of two experts' outputs (2406.18219 section
    5.1, where long texts have it as an angle, 1 - arccos / pi; an output of zeros has cosine 0).
    "chosen_norm", [1]: the l2 norm of the chosen experts' outputs over that of all experts', the
    mean over tokens; above 1 the router prefers experts with large outputs (section 5.2).
    """
    product, chosen, num_tokens = torch.zeros(1), torch.zeros(1), 0
    for part_ETD, index_TK in _in_parts(chunks):
        exact = torch.promote_types(part_ETD.dtype, torch.float32)
        outputs_ETD = part_ETD.to(exact)
        norm_TE = torch.linalg.vector_norm(outputs_ETD, dim=-1).T
        share_TE = norm_TE / norm_TE.mean(dim=1, keepdim=True).clamp(min=torch.finfo(exact).tiny)
        unit_EF = F.normalize(outputs_ETD, dim=-1).flatten(1)
        product = product.to(unit_EF.device) + (unit_EF @ unit_EF.T).double()
        chosen = chosen + share_TE.gather(1, index_TK).mean(dim=1).double().sum().cpu()
        num_tokens += len(norm_TE)
    return {"output": product.cpu() / num_tokens, "chosen_norm": chosen / num_tokens}


def _in_parts(chunks: Iterable[Outputs]) -> Iterator[tuple[Tensor, Tensor]]:
    """The outputs and indices of a few tokens at a time: so many are copied."""
    for chunk in chunks:
        tokens = max(1, CHUNK // chunk.outputs_ETD[:, 0].numel())
        parts = chunk.outputs_ETD.split(tokens, dim=1), chunk.index_TK.split(tokens)
        yield from zip(*parts, strict=True)


def projections(experts: Experts) -> dict[str, Tensor]:
    """Views [E, ...] of the experts' matrices: "gate" (where they have one), "up" and "down"."""
    if not experts.has_gate:
        return {"up": experts.up_proj, "down": experts.down_proj}
    both = experts.gate_up_proj[: len(experts.down_proj)].movedim(
        2 if experts.is_transposed else 1, 1
    )
    gate, up = both.chunk(2, dim=1) if experts.is_concatenated else (both[:, ::2], both[:, 1::2])
    return {"gate": gate, "up": up, "down": experts.down_proj}


def router_rows(layer: MoELayer) -> Tensor:
    """Each expert's row [E, D] of the router's weight."""
    router = set(layer.router.modules())
    return next(
        tensor.movedim(axis, 0)[: layer.info.num_experts]
        for module, _, tensor, axis in by_expert(layer)
        if module in router and tensor.dim() == 2
    )


def cosine(rows: Tensor) -> Tensor:
    """Cosines [E, E] between rows [E, ...], read in parts, never copied whole; 0 for zero rows.

    Products of half-precision rows are taken in float32, and added up in float64.
    """
    num_rows, exact = len(rows), torch.promote_types(rows.dtype, torch.float32)
    product = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=rows.device)
    for part in rows.split(max(1, CHUNK // rows[:, 0].numel()), dim=1):
        part_EF = part.reshape(num_rows, -1).to(exact)
        product += (part_EF @ part_EF.T).double()
    norm = product.diagonal().sqrt()
    scale = norm[:, None] * norm[None, :]
    return torch.where(scale > 0, product / scale, torch.zeros_like(product)).cpu()
