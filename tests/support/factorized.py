"""Layers of tiny models in factors, by hand: full-rank ones compute what the layer did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.factorize import FactorizeExperts
from moe_lab.models.edits.plan import Plan
from moe_lab.models.factorized import factor_name, stacked
from moe_lab.models.layers import MoELayer, moe_layers

Given = Mapping[str, Tensor]


def full_rank(weight_EON: Tensor) -> tuple[dict, dict[str, Tensor]]:
    """Factors of every matrix by itself that are it: U S and V^T."""
    u, s, vt = torch.linalg.svd(weight_EON.detach(), full_matrices=False)
    spec = {"kind": "low_rank", "rank": s.shape[1], "shared": None, "base": None}
    return spec, {"left": u * s[:, None], "right": vt}


def in_full_rank(layer: MoELayer) -> tuple[Edit, dict[str, Tensor]]:
    """The edit of one layer, and its tensors."""
    index, specs, tensors = layer.info.index, {}, {}
    for matrix, weight in stacked(layer.experts).items():
        specs[matrix], given = full_rank(weight)
        tensors |= {factor_name(index, matrix, name): one for name, one in given.items()}
    return FactorizeExperts(index, layer.info.name, "svd", **specs, of=2, parameters=1), tensors


def full_rank_plan(
    model: PreTrainedModel, first: Sequence[Edit] = (), indices: Sequence[int] | None = None
) -> Plan:
    """All layers, or these, in full rank, behind the edits `first`."""
    edits, tensors = list(first), dict[str, Tensor]()
    for layer in moe_layers(model):
        if indices is None or layer.info.index in indices:
            edit, given = in_full_rank(layer)
            edits.append(edit)
            tensors |= given
    return Plan(tuple(edits), tensors=tensors)
