"""Plans whose router rows stay while experts go, saved and by a slow reference."""

from __future__ import annotations

from pathlib import Path

import torch
from families import logits_of, tiny_batch, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.models.editing import constants_name
from moe_lab.models.edits.merge import MergeExperts
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.forms import form_of
from moe_lab.models.layers import MoELayer, moe_layers
from moe_lab.models.saving import save_checkpoint

KEPT = {"constant": (6, 1, 3, 4), "copy": (0, 2, 5, 7, 1), "zero": (3, 2, 0)}
GROUPS = ((0, 1, 2), (3,), (5, 4), (7, 6))  # within the two router groups of deepseek_v3


def replaced(model: nn.Module, *kinds: str) -> Plan:
    """A plan that replaces experts of the first MoE layers, a kind for each."""
    edits, tensors = [], {}
    for layer, kind in zip(moe_layers(model), kinds, strict=False):
        index, kept = layer.info.index, KEPT[kind]
        edits.append(PruneExperts(index, layer.info.name, kept=kept, replacement=kind))
        if kind == "constant":
            generator = torch.Generator().manual_seed(index)
            tensors[constants_name(index)] = torch.randn(8 - len(kept), 32, generator=generator)
    return Plan(tuple(edits), tensors=tensors)


def merged(model: nn.Module, router: str = "all") -> Plan:
    kept = tuple(group[0] for group in GROUPS)
    weights = tuple((1 / len(group),) * len(group) for group in GROUPS)
    edits = (
        MergeExperts(one.info.index, one.info.name, kept=kept, groups=GROUPS, weights=weights,
             router=router)
        for one in moe_layers(model)
    )  # fmt: skip
    return Plan(tuple(edits))


def slow_expert(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    """One expert on one token, written from the families' descriptions."""
    experts = layer.experts
    into, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if layer.info.family == "gpt_oss":
        both = x @ into + experts.gate_up_proj_bias[expert]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ down + experts.down_proj_bias[
            expert
        ]
    width = into.shape[0] // 2
    return down @ (F.silu(into[:width] @ x) * (into[width:] @ x))


def saved(family: str, folder: Path) -> tuple[nn.Module, Plan, str]:
    """A model with constants, with copies, and in all other layers merged experts, on disk."""
    folder.mkdir()
    model = tiny_model(family)
    model.save_pretrained(folder / "source")
    first = replaced(model, "constant", "copy")
    plan = Plan((*first.edits, *merged(model).edits[2:]), tensors=first.tensors)
    foreseen = form_of(model.config, plan.edits)
    apply_plan(model, plan)
    batch = tiny_batch()
    save_file(batch | {"logits": logits_of(model, batch)}, folder / "expected.safetensors")
    form = save_checkpoint(model, folder / "model", folder / "source")
    assert not form.stock
    assert form.reason == foreseen.reason
    return model, plan, form.reason
