"""Models whose experts keep some of their hidden units, and by hand what these compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_lab.models.edits.narrow import NarrowExperts
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.narrowing import neurons_name, shared_neurons_name

UNEVEN = (0, 5, 9, 12, 1, 12, 7, 3)  # widths of eight experts, of which one has none


def narrow_plan(
    model: PreTrainedModel,
    widths: Sequence[int] | Mapping[int, Sequence[int]],
    shared: int | None = None,
    seed: int = 0,
) -> Plan:
    """Each layer's experts keep so many hidden units, drawn at random; shared: the shared ones."""
    generator = torch.Generator().manual_seed(seed)
    edits, tensors = [], {}
    for info in (layer.info for layer in moe_layers(model)):
        some = widths if isinstance(widths, Sequence) else widths.get(info.index)
        if some is None:
            continue
        size = info.num_experts, info.expert_width
        rank_EI = torch.rand(size, generator=generator).argsort(dim=1).argsort(dim=1)
        kept_EI = rank_EI < torch.tensor(list(some))[:, None]
        tensors[neurons_name(info.index)] = kept_EI.to(torch.uint8)
        if shared is not None:
            kept_I = torch.randperm(info.shared_width, generator=generator) < shared
            tensors[shared_neurons_name(info.index)] = kept_I.to(torch.uint8)
        edits.append(NarrowExperts(info.index, info.name, tuple(some), shared))
    return Plan(tuple(edits), tensors=tensors)


def narrow(model: PreTrainedModel, widths: Sequence[int] | Mapping[int, Sequence[int]]) -> Plan:
    """Carry such a plan out."""
    plan = narrow_plan(model, widths)
    apply_plan(model, plan)
    return plan


def by_hand(
    dense: Path, family: str, index: int, kept_EI: Tensor, x_TD: Tensor, chosen: tuple[Tensor, ...]
) -> Tensor:
    """What the routed experts of a layer add [T, D], token by token, from the files of the source.

    kept_EI: which hidden units count; chosen: the router's weights and indices [T, K].
    """
    files = load_file(dense / "model.safetensors")
    out_TD = torch.zeros_like(x_TD)
    for token, (weights, experts) in enumerate(zip(*chosen, strict=True)):
        for weight, expert in zip(weights.tolist(), experts.tolist(), strict=True):
            hidden, down_DI, bias = _hidden(files, family, index, expert, x_TD[token])
            for unit in kept_EI[expert].nonzero()[:, 0].tolist():
                out_TD[token] += weight * hidden[unit] * down_DI[:, unit]
            out_TD[token] += weight * bias
    return out_TD


def _hidden(
    files: dict[str, Tensor], family: str, index: int, expert: int, x_D: Tensor
) -> tuple[Tensor, Tensor, Tensor | float]:
    """What an expert's hidden units compute [I], its down projection [D, I] and its bias."""
    if family == "gpt_oss":
        path = f"model.layers.{index}.mlp.experts."
        both = (
            x_D @ files[f"{path}gate_up_proj"][expert] + files[f"{path}gate_up_proj_bias"][expert]
        )
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return hidden, files[f"{path}down_proj"][expert].T, files[f"{path}down_proj_bias"][expert]
    names, path = ("gate_proj", "up_proj", "down_proj"), f"model.layers.{index}.mlp.experts"
    if family == "mixtral":
        names, path = ("w1", "w3", "w2"), f"model.layers.{index}.block_sparse_moe.experts"
    gate_ID, up_ID, down_DI = (files[f"{path}.{expert}.{name}.weight"] for name in names)
    return F.silu(gate_ID @ x_D) * (up_ID @ x_D), down_DI, 0.0
