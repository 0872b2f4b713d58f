"""CD-MoE: divergences, expert and layer search against brute force over the whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.condense import Search, js_divergence, mean_gates, shared_gate
from moe_lab.methods import Evidence
from moe_lab.methods.condense import Condense
from moe_lab.moe import apply_plan, moe_layers
from moe_lab.statistics import collect
from moe_lab.stream import LayerStream
from moe_lab.types import LayerInfo, UserError

FAMILIES = ["qwen2_moe", "deepseek_v2", "deepseek_v3", "mixtral"]


def textbook_js(u_logits: Tensor, v_logits: Tensor) -> Tensor:
    """As the paper's released code defines it, in float64: one value per token."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        p, q = p + 1e-10, q + 1e-10
        return (p * (p / q).log()).sum(dim=-1)

    u, v = u_logits.double().softmax(-1), v_logits.double().softmax(-1)
    m = (u + v) / 2
    return (kl(u, m) + kl(v, m)) / 2


def test_js_divergence_equals_the_textbook_form() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(50, 64, generator=generator)
    for distance in (1e-3, 1e-2, 1.0, 10.0, 100.0):
        v = u + distance * torch.randn(50, 64, generator=generator)
        expected = textbook_js(u, v)
        torch.testing.assert_close(js_divergence(u.double(), v.double()), expected,
                                   rtol=1e-9, atol=1e-16)  # fmt: skip
        # In float32 the inputs' own rounding is what remains of the error.
        torch.testing.assert_close(js_divergence(u, v).double(), expected, rtol=2e-3, atol=1e-12)
    assert js_divergence(u, u).abs().max() == 0
    far = js_divergence(torch.eye(2) * 1000, torch.eye(2).flip(0) * 1000)
    assert far.tolist() == pytest.approx([torch.tensor(2.0).log().item()] * 2, rel=1e-6)


class Condensed(nn.Module):
    """A condensed layer written as the sum it stands for, expert by expert."""

    def __init__(self, layer, experts: list[int], gates: Tensor, gate: float):
        super().__init__()
        self.layer, self.experts, self.gates, self.gate = layer, experts, gates, gate

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if self.layer.shared is not None:
            out = out + self.gate * self.layer.shared(x)
        weights = self.layer.experts
        for expert in self.experts:
            gate, up = F.linear(x, weights.gate_up_proj[expert]).chunk(2, dim=-1)
            hidden = F.silu(gate) * up
            out = out + self.gates[expert] * F.linear(hidden, weights.down_proj[expert])
        return out


def brute_force_states(model, batches: list[dict]) -> list[list[Tensor]]:
    """Per document the hidden states of a full forward: embeddings, each layer, the last normed."""
    documents = []
    with torch.no_grad():
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states
            for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
                documents.append([state[row, :length] for state in states])
    return documents


def brute_force_divergence(intact: list, changed: list, position: int) -> float:
    """Mean over a document's tokens, then over documents."""
    values = [
        textbook_js(a[position], b[position]).mean() for a, b in zip(intact, changed, strict=True)
    ]
    return float(torch.stack(values).mean())


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


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A model in float64, its batches (with padding), statistics, intact states, and our plan."""
    model = tiny_model(request.param).double()
    model.set_experts_implementation("eager")  # the default one knows no float64
    batches = [tiny_batch(seed=seed) for seed in (0, 1)]
    found = collect(model, batches)
    method = Condense(num_layers=2, num_routed=3, experts="greedy_js", layers="greedy_js")
    plan = method.plan(Evidence(found, lambda: model, lambda: batches))
    statistics = {layer.info.index: layer for layer in found}
    return model, batches, statistics, brute_force_states(model, batches), plan


def test_expert_search_equals_brute_force(case) -> None:
    model, batches, statistics, intact, plan = case
    ours = {edit.index: edit for edit in (*plan.edited(), *plan.searched)}
    assert sorted(ours) == sorted(statistics)
    for index, edit in ours.items():
        chosen: list[int] = []
        for step in range(4):
            if step > 0:
                values = {}
                for expert in set(range(8)) - set(chosen):
                    if statistics[index]["count"][expert] > 0:
                        changed = with_condensed(model, {index: [*chosen, expert]}, statistics)
                        states = brute_force_states(changed, batches)
                        values[expert] = brute_force_divergence(intact, states, index + 1)
                chosen.append(min(sorted(values), key=values.__getitem__))
                value = values[chosen[-1]]
            else:
                states = brute_force_states(with_condensed(model, {index: []}, statistics), batches)
                value = brute_force_divergence(intact, states, index + 1)
            assert edit.divergence[step] == pytest.approx(value, rel=1e-6)
        assert edit.experts == tuple(chosen)


def test_layer_search_equals_brute_force(case) -> None:
    model, batches, statistics, intact, plan = case
    experts = {edit.index: list(edit.experts) for edit in (*plan.edited(), *plan.searched)}
    order: list[int] = []
    for step in range(2):
        values = {}
        for index in sorted(set(experts) - set(order)):
            choices = {i: experts[i] for i in (*order, index)}
            states = brute_force_states(with_condensed(model, choices, statistics), batches)
            values[index] = brute_force_divergence(intact, states, -1)
        order.append(min(values, key=values.__getitem__))
        assert plan.layer_divergence[step] == pytest.approx(values[order[-1]], rel=1e-6)
    assert plan.layer_order == tuple(order)


def test_the_condensed_model_is_what_the_search_looked_at(case) -> None:
    model, batches, statistics, _, plan = case
    choices = {edit.index: list(edit.experts) for edit in plan.edited()}
    expected = with_condensed(model, choices, statistics)
    condensed = copy.deepcopy(model)
    apply_plan(condensed, plan)
    with torch.no_grad():
        torch.testing.assert_close(condensed(**batches[0]).logits, expected(**batches[0]).logits,
                                   rtol=1e-9, atol=1e-9)  # fmt: skip
    assert plan.edited()[0].shared_gate == shared_gate(statistics[plan.edited()[0].index])


def test_the_search_leaves_the_model_as_it_was(case) -> None:
    model, batches, _, intact, _ = case
    again = brute_force_states(model, batches)
    for one, other in zip(intact, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gates_are_means_over_the_tokens_that_chose_the_expert(case) -> None:
    _, _, statistics, _, _ = case
    for layer in statistics.values():
        gates = mean_gates(layer)
        for expert in range(8):
            count = layer["count"][expert]
            expected = layer["gate_sum"][expert] / count if count else 0.0
            assert gates[expert] == expected


def test_replaying_layer_by_layer_is_the_model() -> None:
    for family in ("qwen2_moe", "gpt_oss", "deepseek_v3", "olmoe"):
        model, batches = tiny_model(family), [tiny_batch(length=20)]
        stream = LayerStream(model, batches)
        with torch.no_grad():
            hidden = stream.hidden[0]
            for index in range(4):
                hidden = stream.replay(index, 0, hidden)
            expected = model.model(**batches[0]).last_hidden_state
            assert torch.equal(stream.finish(hidden), expected), family


def test_layer_search_never_runs_the_whole_model_per_candidate(monkeypatch) -> None:
    model, batches = tiny_model("qwen2_moe"), [tiny_batch()]
    found = collect(model, batches)
    runs: list[int] = []
    original = LayerStream.replay
    monkeypatch.setattr(
        LayerStream, "replay", lambda self, i, *rest: runs.append(i) or original(self, i, *rest)
    )
    Condense(2, 0, "greedy_js", [1]).plan(Evidence(found, lambda: model, lambda: batches))
    before = len(runs)
    Condense(2, 0, "greedy_js", "greedy_js").plan(Evidence(found, lambda: model, lambda: batches))
    # One whole pass, then each candidate from itself on: (3+2+1) + rerun, then two of the rest.
    assert len(runs) - before <= 4 + 6 + 3 + 5 + 3
    search = Search(LayerStream(model, batches), found)
    assert search.open(2).target_TD.shape == (int(batches[0]["attention_mask"].sum()), 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_layers=9), "has 3 MoE layers"),
        (dict(num_layers=0), "has 3 MoE layers"),
        (dict(num_routed=9), "has 8 routed experts"),
        (dict(layers=[1, 7]), r"names \[7\], but the model's MoE layers are \[1, 2, 3\]"),
        (dict(experts=[8]), r"names \[8\]"),
        (dict(layers="greedy_jz"), "there are greedy_js"),
        (dict(experts="greedy_jz"), "there are greedy_js"),
    ],
)
def test_impossible_requests_are_refused(options: dict, message: str) -> None:
    infos = [LayerInfo(i, f"model.layers.{i}.mlp", 8, 2, 32, shared=True) for i in (1, 2, 3)]
    defaults = dict(num_layers=2, num_routed=2, experts="greedy_js", layers="greedy_js")
    with pytest.raises(UserError, match=message):
        Condense(**(defaults | options)).check(infos)
    Condense(**defaults).check(infos)


def test_without_shared_experts_something_must_stay() -> None:
    infos = [LayerInfo(0, "model.layers.0.mlp", 8, 2, 32)]
    with pytest.raises(UserError, match="at least 1"):
        Condense(1, 0, "greedy_js", "greedy_js").check(infos)
