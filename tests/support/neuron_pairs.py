"""Every token at every expert it is sent to, one at a time, with gradients by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from expert_sets import Case
from families import ROUTER_KINDS
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.methods.metrics.base import Metric
from moe_lab.models.hidden_units import HiddenUnits
from moe_lab.models.layers import hidden_of, moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.profile import Profile

EACH_ROUTER = pytest.mark.parametrize("family", ROUTER_KINDS)
UNSEEN = 5  # an expert of deepseek_v3 that its correction bias keeps from every token


@dataclass
class Pair:
    """A token (of valid ones, counted over all batches) at an expert that it is sent to.

    f_D: the expert's output, whose `grad` is the gradient of the loss; y_D: the whole block's.
    """

    document: int
    token: int
    expert: int
    weight: float
    x_D: Tensor
    a_I: Tensor
    f_D: Tensor
    column_ID: Tensor
    y_D: Tensor | None = None

    @property
    def part_I(self) -> Tensor:
        """<w_c, u> of each hidden unit: the loss's gradient at its activation."""
        return torch.stack([column_D @ self.f_D.grad for column_D in self.column_ID])


@contextmanager
def _slow_experts(experts: nn.Module, seen: list) -> Iterator[None]:
    """Experts that compute a token at a time."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = []
        for token, x_D in enumerate(hidden_states):
            row_D = torch.zeros_like(x_D)
            chosen = zip(top_k_index[token].tolist(), top_k_weights[token], strict=True)
            for expert, weight in chosen:
                gate_I, up_I = (experts.gate_up_proj[expert] @ x_D).chunk(2)
                a_I = experts.act_fn(gate_I) * up_I
                f_D = experts.down_proj[expert] @ a_I
                f_D.retain_grad()
                column_ID = experts.down_proj[expert].detach().T
                seen.append((token, expert, weight.item(), x_D.detach(), a_I, f_D, column_ID))
                row_D = row_D + weight * f_D
            rows.append(row_D)
        return torch.stack(rows)

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def pairs_of(case: Case) -> dict[int, list[Pair]]:
    """The pairs of each MoE layer, by layer index; the loss is the mean over all targets."""
    found: dict[int, list[Pair]] = {}
    losses, documents, tokens = [], 0, 0
    for batch in case.batches:
        mask = batch["attention_mask"].bool()
        logits, seen, outputs = _watched(case, batch)
        targets = mask[:, :-1] & mask[:, 1:]
        labels = batch["input_ids"][:, 1:][targets]
        losses.append(F.cross_entropy(logits[:, :-1][targets], labels, reduction="none"))
        place = mask.flatten().cumsum(0) - 1 + tokens
        for index, pairs in seen.items():
            for token, expert, weight, x_D, a_I, f_D, column_ID in pairs:
                if mask.flatten()[token]:
                    one = Pair(
                        documents + token // mask.shape[1], int(place[token]), expert, weight,
                        x_D, a_I.detach(), f_D, column_ID, outputs[index][token],
                    )  # fmt: skip
                    found.setdefault(index, []).append(one)
        documents, tokens = documents + len(mask), tokens + int(mask.sum())
    torch.cat(losses).mean().backward()
    case.model.zero_grad()
    return found


def _watched(case: Case, batch: dict) -> tuple[Tensor, dict[int, list], dict[int, Tensor]]:
    """Logits of a batch, and of each MoE layer the pairs and the block's output [B * L, D]."""
    layers = moe_layers(case.model)
    seen: dict[int, list] = {layer.info.index: [] for layer in layers}
    outputs: dict[int, Tensor] = {}
    handles, opened = [], []
    for layer in layers:
        index, size = layer.info.index, layer.info.hidden_size

        def keep(module, args, output, index=index, size=size) -> None:
            outputs[index] = hidden_of(output).detach().reshape(-1, size)

        handles.append(layer.block.register_forward_hook(keep))
        opened.append(_slow_experts(layer.experts, seen[index]))
    for one in opened:
        one.__enter__()
    logits = case.model(**batch, use_cache=False).logits
    for one in opened:
        one.__exit__(None, None, None)
    for handle in handles:
        handle.remove()
    return logits, seen, outputs


def profile_of(case: Case, positions: list[int] | None = None) -> Profile:
    """One that opens the case's model over its batches."""
    return Profile(
        case.statistics,
        lambda number=None: LayerStream(case.model, case.batches, positions=positions),
    )


def with_an_unseen_expert() -> Case:
    """deepseek_v3, whose correction bias keeps one expert from every token."""
    case = Case("deepseek_v3")
    for decoder in case.model.model.layers[1:]:
        decoder.mlp.gate.e_score_correction_bias[UNSEEN] = -9.0
    return case


def assert_close(scores: list[Tensor], expected: dict[int, Tensor], case: Case) -> None:
    """Each layer's scores are those of the reference."""
    assert len(scores) == len(case.statistics) == len(expected)
    exact = max(case.exact, 1e-9)
    for layer, score_EI in zip(case.statistics, scores, strict=True):
        assert score_EI.shape == (layer.info.num_experts, layer.info.expert_width)
        expected_EI = expected[layer.info.index]
        scale = float(expected_EI.abs().max())
        assert scale > 0
        assert torch.allclose(score_EI, expected_EI, rtol=1e3 * exact, atol=1e3 * exact * scale)


def nothing(case: Case, index: int) -> Tensor:
    """Zeros [E, I] of a layer."""
    info = case.infos[index]
    return torch.zeros(info.num_experts, info.expert_width, dtype=torch.float64)


def check_permuted(case: Case, metric: Metric, expert: int = 1) -> None:
    """With an expert's hidden units in another order its scores are, and all others the same."""
    other = copy.copy(case)
    other.model = copy.deepcopy(case.model)
    order_I = torch.randperm(case.statistics[0].info.expert_width)
    layer = moe_layers(other.model)[0]
    units = HiddenUnits(layer.experts)
    with torch.no_grad():
        for name, tensor in units.expert(expert, order_I).items():
            units.tensors[name][expert] = tensor
    before = metric.neuron_scores(profile_of(case))
    after = metric.neuron_scores(profile_of(other))
    before[0] = before[0].clone()
    before[0][expert] = before[0][expert][order_I]
    for one, same in zip(after, before, strict=True):
        assert one.std() > 0
        assert torch.allclose(one, same, rtol=1e-6, atol=1e-9 * float(same.abs().max()))


def without_model(profile: Profile) -> Profile:
    """The same, whose answers were given before: it cannot open its model."""
    known: dict[str, dict] = {}

    def remember(identity, work, code):
        key = str(sorted(identity.items()))
        if key not in known:
            known[key] = work()
        return known[key]

    return replace(profile, remember_tensors=remember)
