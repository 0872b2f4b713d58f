"""Refits of tiny models, and by hand what they should be: from raw activations, token by token."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import scipy.linalg
import torch
from families import tiny_batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.prune import Prune
from moe_lab.methods.ratios.uniform import Uniform
from moe_lab.methods.ridge import UNIT_FLOOR, Ridge
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.experts import expert_hidden, expert_parameters, scales_input
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import MoELayer, moe_layers, standing_at
from moe_lab.models.stream import LayerStream, States, swapped
from moe_lab.models.widths import widths_of
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.documents import held_out
from moe_lab.profile.edited_layer import EditedLayer
from moe_lab.profile.profile import Profile
from moe_lab.profile.propagate import edited_block

DOCUMENTS, LENGTH = 12, 26


def text(seed: int = 0, documents: int = DOCUMENTS) -> dict[str, Tensor]:
    """Documents of 26, 24, 22, ... tokens."""
    return tiny_batch(seed, batch=documents, length=2 * documents + 2)


def profile_of(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> Profile:
    """Of a model in memory; the first so many documents of the first batch where asked."""

    def open_stream(num_samples: int | None = None) -> LayerStream:
        if num_samples is None:
            return LayerStream(model, batches)
        return LayerStream(model, [{name: part[:num_samples] for name, part in batches[0].items()}])

    statistics = collect_statistics(model, batches, neurons=True)
    number = sum(len(batch["input_ids"]) for batch in batches)

    def open_model(num_samples: int | None = None) -> tuple[PreTrainedModel, list[dict]]:
        return copy.deepcopy(model), list(batches[:1])

    return Profile(statistics, open_stream, open_model, num_documents=number)


def pruned(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], **options: Any) -> Plan:
    """Half of the experts go by REAP, and what stays is refitted."""
    method = Prune(reap, Uniform(0.5), refit=True, **options)
    method.check([layer.info for layer in moe_layers(model)])
    return method.plan(profile_of(model, batches))


def divergence(model: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> float:
    """KL of the second one's predictions to the first one's, mean over the tokens."""
    with torch.no_grad():
        log_p, log_q = (one(**batch).logits.log_softmax(-1).double() for one in (model, other))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return float(kl[batch["attention_mask"].bool()].mean())


def carried_out(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """A copy of the model with the plan's edits."""
    other = copy.deepcopy(model)
    apply_plan(other, plan)
    return other


def before(plan: Plan, index: int, targets: str) -> Plan:
    """The plan without the refit of a layer; its edits alone, or with those of layers before it."""
    of_layer = [edit for edit in plan.edits if edit.index == index and edit.kind != "refit"]
    earlier: list[Edit] = [edit for edit in plan.edits if edit.index < index]
    return Plan((*(earlier if targets == "sequential" else ()), *of_layer), tensors=plan.tensors)


class Seen(NamedTuple):
    """Of valid tokens at one layer: what left it [T, D], its block's input, choices, weights."""

    leaving_TD: Tensor
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor


def seen(model: PreTrainedModel, index: int, batch: dict[str, Tensor]) -> Seen:
    """What passes one MoE layer of a model in a plain forward pass."""
    [layer] = [one for one in moe_layers(model) if one.info.index == index]
    found: dict[str, Any] = {}

    def experts(module: nn.Module, args: tuple[Any, ...]) -> None:
        found["experts"] = args

    def decoder(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found["leaving"] = output[0] if isinstance(output, tuple) else output

    handles = [
        layer.experts.register_forward_pre_hook(experts),
        layer.decoder.register_forward_hook(decoder),
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    valid = batch["attention_mask"].bool()
    x, row, weight = (one.reshape(valid.numel(), -1)[valid.reshape(-1)] for one in found["experts"])
    return Seen(found["leaving"][valid], x, row, weight)


def layer_of(model: PreTrainedModel, index: int) -> MoELayer:
    """One MoE layer."""
    return next(one for one in moe_layers(model) if one.info.index == index)


def activations(layer: MoELayer, passed: Seen) -> Tensor:
    """What the hidden units of all experts, then of the shared ones, add by column [T, N].

    Token by token from the layer's weights, times the router's weights and the shared gate.
    """
    units = HiddenUnits(layer.experts)
    width, (num_tokens, _) = units.width, passed.x_TD.shape
    z_TEI = torch.zeros(num_tokens, len(layer.experts.down_proj), width, dtype=torch.float64)
    parameters = expert_parameters(layer.experts)
    for token, (x_D, row_K, weight_K) in enumerate(
        zip(passed.x_TD, passed.index_TK.tolist(), passed.weight_TK, strict=True)
    ):
        for row, weight in zip(row_K, weight_K, strict=True):
            places = getattr(layer.experts, "place_E", None)
            expert = row if places is None else int(places[row])
            if expert >= len(parameters):
                continue
            inside = weight if scales_input(layer.experts) else 1.0
            h_1I = expert_hidden(layer.experts, parameters[expert], (inside * x_D)[None])
            outside = 1.0 if scales_input(layer.experts) else float(weight)
            z_TEI[token, expert] += outside * h_1I[0].double()
    kept_EI = torch.arange(width) < torch.tensor(widths_of(layer.experts))[:, None]
    z_TN = z_TEI[:, kept_EI]
    if layer.info.shared_width:
        shared = layer.shared
        h_TI = shared.act_fn(shared.gate_proj(passed.x_TD)) * shared.up_proj(passed.x_TD)
        if layer.shared_gate is not None:
            h_TI = h_TI * torch.sigmoid(layer.shared_gate(passed.x_TD))
        z_TN = torch.cat([z_TN, h_TI.double()], dim=1)
    return z_TN.detach()


def columns(layer: MoELayer) -> Tensor:
    """The columns of the same units [N, D]."""
    down_EID = HiddenUnits(layer.experts).down_columns()
    kept_EI = torch.arange(down_EID.shape[1]) < torch.tensor(widths_of(layer.experts))[:, None]
    found = [down_EID[kept_EI]]
    if layer.info.shared_width:
        found.append(layer.shared.down_proj.weight.T)
    return torch.cat(found).detach().double()


def by_hand(
    z_TN: Tensor, missing_TD: Tensor, weight_T: Tensor, ridge: Ridge, old_ND: Tensor
) -> Tensor:
    """The new columns [N, D] by scipy: the ridge is rows of a plain least-squares problem."""
    root_T1 = weight_T.double().sqrt()[:, None]
    z_TN, missing_TD = root_T1 * z_TN, root_T1 * missing_TD
    square_N = z_TN.square().sum(dim=0)
    lambda_N = ridge.strength * (
        square_N.mean().expand(len(square_N))
        if ridge.scale == "mean"
        else square_N.clamp(min=UNIT_FLOOR * float(square_N.mean()))
    )
    system = torch.cat([z_TN, lambda_N.sqrt().diag()]).numpy()
    wanted = torch.cat([missing_TD, torch.zeros_like(old_ND)]).numpy()
    return old_ND + torch.from_numpy(scipy.linalg.lstsq(system, wanted)[0])


@contextmanager
def opened(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    plan: Plan,
    index: int,
    token_weight: str = "output",
) -> Iterator[EditedLayer]:
    """One layer of an otherwise intact model, after its edits, ready to be refitted."""
    stream = LayerStream(model, batches)
    given, wanted = States(stream, "given"), States(stream, "wanted")
    given.move_to(index)
    wanted.pass_through(index, functools.partial(stream.replay, index))
    own = [edit for edit in plan.edits if edit.index == index and edit.kind != "refit"]
    block = edited_block(stream, index, own, plan.tensors)
    with swapped(stream, index, block):
        layer = standing_at(model, stream.moe[index].info.name)
        assert isinstance(layer, MoELayer)
        held = held_out(range(DOCUMENTS * len(batches)))
        yield EditedLayer(layer, given, wanted, token_weight, held)
