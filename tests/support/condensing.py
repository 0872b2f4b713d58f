"""CD-MoE by brute force over whole models, and our plans beside it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.methods.condense.base import shared_gate
from moe_lab.methods.condense.gates.mean_selected import choose as mean_gates
from moe_lab.methods.condense.method import Condense
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.profile import Profile


def textbook_js(u_logits: Tensor, v_logits: Tensor) -> Tensor:
    """As the paper's released code defines it, in float64: one value per token."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        p, q = p + 1e-10, q + 1e-10
        return (p * (p / q).log()).sum(dim=-1)

    u, v = u_logits.double().softmax(-1), v_logits.double().softmax(-1)
    m = (u + v) / 2
    return (kl(u, m) + kl(v, m)) / 2


def textbook_kl(u_logits: Tensor, v_logits: Tensor) -> Tensor:
    """KL(u||v) with 1e-10 added to both, in float64."""
    u, v = (logits.double().softmax(-1) + 1e-10 for logits in (u_logits, v_logits))
    return (u * (u / v).log()).sum(dim=-1)


TEXTBOOK = {"js": textbook_js, "kl": textbook_kl}


class Condensed(nn.Module):
    """A condensed layer written as the sum it stands for, expert by expert."""

    def __init__(self, layer, experts: list[int], gates: Tensor, gate: float):
        super().__init__()
        self.layer, self.experts, self.gates, self.gate = layer, experts, gates, gate

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, None]:
        out = torch.zeros_like(x)
        if self.layer.shared is not None:
            out = out + self.gate * self.layer.shared(x)
        weights, of_gpt_oss = self.layer.experts, self.layer.info.family == "gpt_oss"
        for expert in self.experts:
            compute = gpt_oss_expert if of_gpt_oss else gated_expert
            out = out + self.gates[expert] * compute(weights, expert, x)
        return (out, None) if of_gpt_oss else out


def gated_expert(weights, expert: int, x: Tensor) -> Tensor:
    gate, up = F.linear(x, weights.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights.down_proj[expert])


def gpt_oss_expert(weights, expert: int, x: Tensor) -> Tensor:
    """Interleaved, with biases, a limit of 7 and a sigmoid of 1.702 times the gate."""
    both = x @ weights.gate_up_proj[expert] + weights.gate_up_proj_bias[expert]
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return hidden @ weights.down_proj[expert] + weights.down_proj_bias[expert]


def brute_force_states(model, batches: list[dict]) -> list[list[Tensor]]:
    """Per document the hidden states of a full forward: embeddings, each layer, the last normed."""
    documents = []
    with torch.no_grad():
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states
            for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
                documents.append([state[row, :length] for state in states])
    return documents


def brute_force_divergence(intact: list, changed: list, position: int, measure="js") -> float:
    """Mean over a document's tokens, then over documents."""
    textbook = TEXTBOOK[measure]
    values = [
        textbook(a[position], b[position]).mean() for a, b in zip(intact, changed, strict=True)
    ]
    return float(torch.stack(values).mean())


def brute_force_logits_kl(
    intact: list[Tensor], changed: list[Tensor], batches: list[dict]
) -> float:
    """KL of the next token's distribution in nats, of logits: the mean over all but last tokens."""
    values = []
    for p, q, batch in zip(intact, changed, batches, strict=True):
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            log_p, log_q = (one[row, : length - 1].double().log_softmax(-1) for one in (p, q))
            values.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
    return float(torch.cat(values).mean())


def with_condensed(model, choices: dict[int, list[int]], statistics: dict):
    """A copy of the model in which the layers of `choices` are condensed."""
    changed = copy.deepcopy(model)
    for layer in moe_layers(changed):
        index = layer.info.index
        if index in choices:
            gates, gate = mean_gates(statistics[index]), shared_gate(statistics[index])
            block = Condensed(layer, choices[index], gates, gate)
            changed.model.layers[index].mlp = block
    return changed


def planned(measured, **options: object):
    """The plan of Condense with these options, and the stream it used (None for none)."""
    model, batches, found = measured
    streams: list[LayerStream] = []

    def open_stream() -> LayerStream:
        streams.append(LayerStream(model, batches))
        return streams[-1]

    method = Condense(**(dict(num_layers=2, num_routed=2) | options))
    method.check([layer.info for layer in found])
    return method.plan(Profile(found, open_stream)), streams[0] if streams else None


def experts_of(plan) -> dict[int, list[int]]:
    return {edit.index: list(edit.experts) for edit in (*plan.edited(), *plan.searched)}
