"""Routers that choose a token's experts by its id, from a table (DeepSeek-V4's first layers).

The router's weights say how much each of them counts, and not which they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.models.layers import MoELayer


def is_hashed(layer: MoELayer) -> bool:
    """Whether the layer's router has a table of experts by token id."""
    return bool(_tables(layer.router))


def _tables(router: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Tables [V, K] of expert numbers in a router: its tensors of integers with two dimensions."""
    return [
        (module, key, tensor)
        for module in router.modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and tensor.dim() == 2 and not tensor.is_floating_point()
    ]


def num_token_ids(layer: MoELayer) -> int:
    """How many token ids the layer's table knows."""
    return len(_tables(layer.router)[0][2])


@torch.no_grad()
def remap_tokens(layer: MoELayer, kept: Sequence[int], into: Mapping[int, int]) -> None:
    """Make the table name the `kept` experts by their new numbers, in place.

    A token that loses an expert gets the one that it went `into`; without one, or where the token
    has that already, the kept expert whose router row is the most similar (cosine) to that of the
    lost one, among those that the token does not have.
    """
    number = {expert: place for place, expert in enumerate(kept)}
    for module, key, table_VK in _tables(layer.router):
        if table_VK.is_meta:
            continue
        rows_ED = layer.router.get_parameter("weight").float()
        similarity_EE = F.cosine_similarity(rows_ED[:, None], rows_ED[None], dim=-1)
        chosen_VK = table_VK.long()
        for gone in sorted(set(range(len(rows_ED))) - number.keys()):
            near = sorted(kept, key=lambda other: -float(similarity_EE[gone, other]))
            if gone in into:
                near = [into[gone], *(expert for expert in near if expert != into[gone])]
            _replace(chosen_VK, gone, near)
        renumber = torch.full((len(rows_ED),), -1, device=table_VK.device)
        renumber[torch.tensor(list(kept), device=table_VK.device)] = torch.arange(
            len(kept), device=table_VK.device
        )
        new = renumber[chosen_VK].to(table_VK.dtype)
        setattr(module, key, nn.Parameter(new, False) if key in module._parameters else new)


def _replace(chosen_VK: Tensor, gone: int, near: Sequence[int]) -> None:
    """Put the first of `near` that its token has not yet in each place of `gone`, in place."""
    for expert in near:
        row_N, place_N = torch.where(chosen_VK == gone)
        free = ~(chosen_VK[row_N] == expert).any(dim=1)
        chosen_VK[row_N[free], place_N[free]] = expert
