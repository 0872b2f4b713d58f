"""CD-MoE: divergences, expert and layer search against brute force over the whole model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import tiny_batch, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lab.methods.condense import divergence
from moe_lab.methods.condense.base import shared_gate
from moe_lab.methods.condense.gates.mean_selected import choose as mean_gates
from moe_lab.methods.condense.layer_search import CondensedSets, greedy_layers
from moe_lab.methods.condense.method import Condense
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.editing import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import Edit, LayerInfo, UserError

FAMILIES = ["qwen2_moe", "deepseek_v2", "deepseek_v3", "mixtral"]


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


@pytest.mark.parametrize("name", TEXTBOOK)
def test_divergences_equal_the_textbook_form(name: str) -> None:
    measure, textbook = getattr(divergence, name), TEXTBOOK[name]
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(50, 64, generator=generator)
    for distance in (1e-3, 1e-2, 1.0, 10.0, 100.0):
        v = u + distance * torch.randn(50, 64, generator=generator)
        expected = textbook(u, v)
        exact = measure(divergence.probability(u.double()), v.double())
        torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-16)
        # In float32 the inputs' own rounding is what remains of the error.
        found = measure(divergence.probability(u), v).double()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-12)
    assert measure(divergence.probability(u), u).abs().max() == 0


def test_js_divergence_of_states_without_common_mass_is_log_2() -> None:
    u, v = torch.eye(2) * 1000, torch.eye(2).flip(0) * 1000
    far = divergence.js(divergence.probability(u), v)
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


def brute_force_divergence(intact: list, changed: list, position: int, measure="js") -> float:
    """Mean over a document's tokens, then over documents."""
    textbook = TEXTBOOK[measure]
    values = [
        textbook(a[position], b[position]).mean() for a, b in zip(intact, changed, strict=True)
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
    found = collect_statistics(model, batches)
    method = Condense(num_layers=2, num_routed=3, experts="greedy_js", layers="greedy_js")
    plan = method.plan(Profile(found, lambda: LayerStream(model, batches)))
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
            hidden = stream.cache["input", 0]
            for index in range(4):
                hidden = stream.replay(index, 0, hidden)
            expected = model.model(**batches[0]).last_hidden_state
            assert torch.equal(stream.finish(hidden), expected), family


# --------------------------------------------------------------------------- every option


@pytest.fixture(scope="module")
def small():
    """A model in float64 with three MoE layers after a dense one, batches and statistics."""
    model = tiny_model("qwen2_moe").double()
    model.set_experts_implementation("eager")
    batches = [tiny_batch(seed=seed) for seed in (0, 1, 2)]
    return model, batches, collect_statistics(model, batches)


def planned(small, **options: object):
    """The plan of Condense with these options, and the stream it used (None for none)."""
    model, batches, found = small
    streams: list[LayerStream] = []

    def open_stream() -> LayerStream:
        streams.append(LayerStream(model, batches))
        return streams[-1]

    method = Condense(**(dict(num_layers=2, num_routed=2) | options))
    method.check([layer.info for layer in found])
    return method.plan(Profile(found, open_stream)), streams[0] if streams else None


def experts_of(plan) -> dict[int, list[int]]:
    return {edit.index: list(edit.experts) for edit in (*plan.edited(), *plan.searched)}


def ranked(scores) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


def l1(model, index: int) -> list[float]:
    experts = model.model.layers[index].mlp.experts
    both = (experts.gate_up_proj, experts.down_proj)
    return [sum(weight[e].detach().abs().sum().item() for weight in both) for e in range(8)]


EXPERT_SCORES = {
    "frequency": lambda model, layer: layer["count"],
    "soft_count": lambda model, layer: layer["probability_sum"],
    "mean_gate": lambda model, layer: mean_gates(layer),
    "l1": lambda model, layer: l1(model, layer.info.index),
}


@pytest.mark.parametrize("name", EXPERT_SCORES)
def test_experts_by_a_score(small, name: str) -> None:
    model, _, found = small
    plan, _ = planned(small, experts=name, num_routed=3)
    expected = {s.info.index: ranked(EXPERT_SCORES[name](model, s))[:3] for s in found}
    assert experts_of(plan) == expected


def test_expert_options_differ(small) -> None:
    names = [*EXPERT_SCORES, "greedy_js", "random"]
    plans = [experts_of(planned(small, experts=name, num_routed=3)[0]) for name in names]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_greedy_kl_chooses_experts_by_kl(small) -> None:
    model, batches, found = small
    statistics = {layer.info.index: layer for layer in found}
    plan, _ = planned(small, experts="greedy_kl")
    intact = brute_force_states(model, batches)
    for edit in (*plan.edited(), *plan.searched):
        chosen: list[int] = []
        for step in (1, 2):
            values = {}
            for expert in set(range(8)) - set(chosen):
                choices = {edit.index: [*chosen, expert]}
                states = brute_force_states(with_condensed(model, choices, statistics), batches)
                values[expert] = brute_force_divergence(intact, states, edit.index + 1, "kl")
            chosen.append(min(sorted(values), key=values.__getitem__))
            assert edit.divergence[step] == pytest.approx(values[chosen[-1]], rel=1e-6)
        assert list(edit.experts) == chosen


@pytest.mark.parametrize("kind", ["experts", "layers"])
def test_random_follows_the_seed(small, kind: str) -> None:
    def choice(seed: int):
        plan, _ = planned(small, **{kind: "random"}, num_layers=1, seed=seed, num_routed=3)
        return experts_of(plan) if kind == "experts" else plan.layer_order

    assert choice(1) == choice(1)
    assert len({str(choice(seed)) for seed in range(6)}) > 1


def brute_force_perplexity(model, batches: list[dict]) -> float:
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            labels = batch["input_ids"][row, 1:length]
            losses.append(F.cross_entropy(logits[row, : length - 1], labels, reduction="none"))
    return float(torch.cat(losses).mean().exp())


def harm(small, name: str, sets: list[tuple[int, ...]], experts: dict) -> list[float]:
    """What an option minimises, for each set of condensed layers, by running whole models."""
    model, batches, found = small
    statistics = {layer.info.index: layer for layer in found}
    intact = brute_force_states(model, batches)
    values = []
    for one in sets:
        changed = with_condensed(model, {i: experts[i] for i in one}, statistics)
        if name == "ppl":
            values.append(brute_force_perplexity(changed, batches))
        else:
            position = one[0] + 1 if name == "local" else -1
            measure = "kl" if name == "kl" else "js"
            states = brute_force_states(changed, batches)
            values.append(brute_force_divergence(intact, states, position, measure))
    return values


@pytest.mark.parametrize("name", ["js", "kl", "ppl"])
def test_greedy_layers_against_brute_force(small, name: str) -> None:
    plan, _ = planned(small, layers=f"greedy_{name}", num_layers=3)
    experts, order = experts_of(plan), ()
    for step in range(3):
        sets = [(*order, index) for index in (1, 2, 3) if index not in order]
        values = harm(small, name, sets, experts)
        best = min(range(len(sets)), key=values.__getitem__)
        order = sets[best]
        assert plan.layer_divergence[step] == pytest.approx(values[best], rel=1e-6)
    assert plan.layer_order == order


@pytest.mark.parametrize("name", ["local", "global"])
def test_one_shot_layers_against_brute_force(small, name: str) -> None:
    plan, _ = planned(small, layers=f"one_shot_{name}", num_layers=3)
    values = harm(small, name, [(1,), (2,), (3,)], experts_of(plan))
    expected = sorted((1, 2, 3), key=lambda index: values[index - 1])
    assert plan.layer_order == tuple(expected)
    assert plan.layer_divergence == pytest.approx(sorted(values), rel=1e-6)


def test_layers_by_cosine_similarity(small) -> None:
    model, batches, _ = small
    plan, stream = planned(small, layers="cosine", num_layers=3, experts="frequency")
    similarities = []
    documents = brute_force_states(model, batches)
    model_states = {index: [(d[index], d[index + 1]) for d in documents] for index in (1, 2)}
    for index in (1, 2):  # the last layer's output is only known after the final norm
        pairs = [F.cosine_similarity(a, b, dim=-1) for a, b in model_states[index]]
        similarities.append(float(torch.cat(pairs).mean()))
    by_layer = dict(zip(plan.layer_order, plan.layer_divergence, strict=True))
    assert [1 - by_layer[index] for index in (1, 2)] == pytest.approx(similarities, rel=1e-9)
    assert list(plan.layer_divergence) == sorted(plan.layer_divergence)
    assert stream is None  # nothing but the profile is needed


def test_first_and_last_layers(small) -> None:
    assert planned(small, layers="first", experts=[0])[0].layer_order == (1, 2)
    assert planned(small, layers="last", experts=[0])[0].layer_order == (3, 2)


def test_only_the_layers_in_question_get_experts(small) -> None:
    plan, _ = planned(small, layers=[3])
    assert [edit.index for edit in plan.edited()] == [3]
    assert plan.searched == ()
    assert len(planned(small, layers="greedy_js", num_layers=1)[0].searched) == 2


def test_a_beam_finds_what_exhaustive_search_finds(small) -> None:
    wide, _ = planned(small, beam=99)
    experts = experts_of(wide)
    pairs = [(1, 2), (1, 3), (2, 3)]
    values = harm(small, "js", pairs, experts)
    assert set(wide.layer_order) == set(pairs[min(range(3), key=values.__getitem__)])
    assert wide.layer_divergence[-1] == pytest.approx(min(values), rel=1e-6)


def test_gates_over_all_tokens(small) -> None:
    _, _, found = small
    plan, _ = planned(small, gates="mean_all", layers=[2], experts=[4, 1])
    layer = next(layer for layer in found if layer.info.index == 2)
    expected = [float(layer["gate_sum"][e] / layer["tokens"]) for e in (4, 1)]
    assert list(plan.edited()[0].gates) == expected
    selected, _ = planned(small, layers=[2], experts=[4, 1])
    assert all(a < b for a, b in zip(expected, selected.edited()[0].gates, strict=True))


# --------------------------------------------------------------------------- cost


def test_from_disk_with_no_memory_for_activations_it_finds_the_same(small, tmp_path) -> None:
    model, batches, found = small
    model.save_pretrained(tmp_path / "model")
    expected, _ = planned(small, num_layers=3)

    def open_stream() -> LayerStream:
        cache = Activations(limit=0, folder=tmp_path)
        source = LayerwiseModel(Checkpoint(tmp_path / "model", "float64"))
        return LayerStream(source, batches, cache)

    plan = Condense(num_layers=3, num_routed=2).plan(Profile(found, open_stream))
    assert plan.to_text() == expected.to_text()


def test_the_layer_search_needs_few_layer_evaluations(small) -> None:
    model, batches, found = small
    stream = LayerStream(model, batches)
    experts = experts_of(planned(small)[0])
    edits = {
        layer.info.index: Edit(
            layer.info.index, layer.info.name, "condense",
            experts=tuple(experts[layer.info.index]), gates=(0.3, 0.3),
        )
        for layer in found
    }  # fmt: skip
    sets = CondensedSets(lambda: stream, edits, lambda identity, work: work())
    greedy_layers(sets, 3, 1, sets.js)
    # The intact model; layers 1, 2, 3 each condensed alone; then from what is kept.
    assert sets.evaluations <= 4 + (3 + 2 + 1) + (3 + 2 + 3) + (3 + 2)
    brute_force = 4 * (1 + 3 + 2 + 1)
    assert sets.evaluations < brute_force
    kept = [key for key in stream.cache._memory if key[0] not in ("input", "intact last")]
    assert len({key[:2] for key in kept}) <= 2 * len(stream.layers)


def test_what_was_found_before_is_not_searched_again(small) -> None:
    model, batches, found = small
    answers: dict[str, object] = {}
    asked: list[str] = []

    def remember(identity, work, code):
        key = json.dumps(identity, sort_keys=True)
        if key not in answers:
            asked.append(identity["question"])
            answers[key] = json.loads(json.dumps(work()))
        return answers[key]

    def plan(opened, **options):
        profile = Profile(found, opened, remember=remember)
        return Condense(**(dict(num_layers=2, num_routed=2) | options)).plan(profile)

    def no_stream() -> LayerStream:
        raise AssertionError("everything is known")

    first = plan(lambda: LayerStream(model, batches))
    assert asked == ["experts"] * 3 + ["js"] * 2
    assert plan(no_stream).to_text() == first.to_text()
    assert plan(no_stream, num_layers=1).layer_order == first.layer_order[:1]
    longer = plan(lambda: LayerStream(model, batches), num_layers=3)
    assert longer.layer_order[:2] == first.layer_order
    assert asked == ["experts"] * 3 + ["js"] * 3
    assert longer.to_text() == planned(small, num_layers=3)[0].to_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_layers=9), "has 3 MoE layers"),
        (dict(num_layers=0), "has 3 MoE layers"),
        (dict(num_routed=9), "has 8 routed experts"),
        (dict(layers=[1, 7]), r"names \[7\], but the model's MoE layers are \[1, 2, 3\]"),
        (dict(experts=[8]), r"names \[8\]"),
        (dict(layers="greedy_jz"), "there are cosine, first, greedy_js"),
        (dict(experts="greedy_jz"), "there are frequency, greedy_js"),
        (dict(gates="median"), "there are mean_all, mean_selected"),
        (dict(beam=0), "at least 1"),
        (dict(beam=2, layers="random"), "leave condense.beam at 1"),
        (dict(padding=2), "from 0 to 1"),
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
