"""The search for layers against brute force over the whole model, and its cost."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from condensing import (
    brute_force_divergence,
    brute_force_logits_kl,
    brute_force_states,
    experts_of,
    planned,
    with_condensed,
)
from families import tiny_batch, tiny_model
from own_edits import ScaleExperts
from torch import nn
from torch.nn import functional as F

from moe_lab.families import references
from moe_lab.methods.condense import layer_search
from moe_lab.methods.condense.layer_search import CondensedSets, greedy_layers
from moe_lab.methods.condense.method import Condense
from moe_lab.models.edits.base import Edit
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.layers import moe_layers
from moe_lab.models.stream import LayerStream
from moe_lab.profile.documents import to_fit_and_choose
from moe_lab.profile.profile import Profile
from moe_lab.types import NotFinite, UserError


def test_layer_search_equals_brute_force(searched) -> None:
    model, batches, statistics, intact, plan = searched
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


def brute_force_perplexity(model, batches: list[dict]) -> float:
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch).logits
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            labels = batch["input_ids"][row, 1:length]
            losses.append(F.cross_entropy(logits[row, : length - 1], labels, reduction="none"))
    return float(torch.cat(losses).mean().exp())


def harm(measured, name: str, sets: list[tuple[int, ...]], experts: dict) -> list[float]:
    """What an option minimises, for each set of condensed layers, by running whole models."""
    model, batches, found = measured
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
def test_greedy_layers_against_brute_force(measured, name: str) -> None:
    plan, _ = planned(measured, layers=f"greedy_{name}", num_layers=3)
    experts, order = experts_of(plan), ()
    for step in range(3):
        sets = [(*order, index) for index in (1, 2, 3) if index not in order]
        values = harm(measured, name, sets, experts)
        best = min(range(len(sets)), key=values.__getitem__)
        order = sets[best]
        assert plan.layer_divergence[step] == pytest.approx(values[best], rel=1e-6)
    assert plan.layer_order == order


@pytest.mark.parametrize("name", ["local", "global"])
def test_one_shot_layers_against_brute_force(measured, name: str) -> None:
    plan, _ = planned(measured, layers=f"one_shot_{name}", num_layers=3)
    values = harm(measured, name, [(1,), (2,), (3,)], experts_of(plan))
    expected = sorted((1, 2, 3), key=lambda index: values[index - 1])
    assert plan.layer_order == tuple(expected)
    assert plan.layer_divergence == pytest.approx(sorted(values), rel=1e-6)


def test_a_beam_finds_what_exhaustive_search_finds(measured) -> None:
    wide, _ = planned(measured, beam=99)
    experts = experts_of(wide)
    pairs = [(1, 2), (1, 3), (2, 3)]
    values = harm(measured, "js", pairs, experts)
    assert set(wide.layer_order) == set(pairs[min(range(3), key=values.__getitem__)])
    assert wide.layer_divergence[-1] == pytest.approx(min(values), rel=1e-6)


def test_the_layer_search_needs_few_layer_evaluations(measured) -> None:
    model, batches, found = measured
    stream = LayerStream(model, batches)
    experts = experts_of(planned(measured)[0])
    edits = {
        layer.info.index: CondenseLayer(
            layer.info.index, layer.info.name,
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


def test_a_value_that_is_none_names_its_set_and_an_infinite_one_is_not_chosen(measured) -> None:
    model, batches, _ = measured

    def answer(values: list[float]) -> CondensedSets:
        sets = CondensedSets(lambda: LayerStream(model, batches), {}, lambda _, work: work())
        sets._divergences = lambda *_: values
        return sets

    assert answer([1.0, float("inf")]).js([(1,), (1, 2)]) == [1.0, float("inf")]
    with pytest.raises(NotFinite, match=r"js with layers \[1, 2\] condensed is NaN"):
        answer([1.0, float("nan")]).js([(1,), (2, 1)])


# A gated shared expert, sigmoid in groups; logits that are divided, multiplied, capped.
HEADS: dict[str, dict] = {
    "qwen2_moe": {},
    "deepseek_v3": {},
    "granitemoe": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=16,
                       logits_scaling=0.25),
    "cohere2_moe": dict(num_experts=8, num_experts_per_tok=2, intermediate_size=16, head_dim=8,
                        first_k_dense_replace=0, logit_scale=3.0),
    "gemma4_text": dict(enable_moe_block=True, num_experts=8, top_k_experts=2, head_dim=8,
                        moe_intermediate_size=16, intermediate_size=48, global_head_dim=8,
                        hidden_size_per_layer_input=0, final_logit_softcapping=2.0),
}  # fmt: skip
BATCHES = [tiny_batch(seed=seed) for seed in (0, 1)]


def at_once(identity, work):
    return work()


def headed(family: str):
    model = tiny_model(family, **HEADS[family]).double()
    model.set_experts_implementation("eager")
    return model


def some_edits(model) -> dict[int, CondenseLayer]:
    edits = {}
    for info in (layer.info for layer in moe_layers(model)):
        gate = 0.3 if info.family == "qwen2_moe" else 1.0
        chosen = (info.index, 7)
        edits[info.index] = CondenseLayer(info.index, info.name, chosen, (0.7, 0.4), gate)
    return edits


def logits_kl_of_whole_models(family: str, edits: list[Edit]) -> float:
    """By stock transformers, each edited layer given constant weights by hooks."""
    changed = references.logits_of(headed(family), BATCHES)
    model = headed(family)
    for edit in edits:
        changed = references.with_constant_weights(model, edit.to_json(), BATCHES)
    return brute_force_logits_kl(references.logits_of(headed(family), BATCHES), changed, BATCHES)


@pytest.mark.parametrize("family", HEADS)
def test_the_divergence_of_predictions_is_that_of_whole_models(family: str) -> None:
    model = headed(family)
    edits, before = some_edits(model), copy.deepcopy(model.state_dict())
    stream = LayerStream(model, BATCHES)
    sets = CondensedSets(lambda: stream, edits, at_once)
    asked = [(2,), (1, 3), (), (3,)]
    expected = [logits_kl_of_whole_models(family, [edits[i] for i in one]) for one in asked]
    assert sets.logits_kl(asked) == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert sets.logits_kl(asked[1:2]) == pytest.approx(expected[1:2], rel=1e-5)
    assert min(expected[0], expected[1], expected[3]) > 1e-3 and expected[2] == 0
    after = model.state_dict()
    assert all(torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.parametrize("family", ["granitemoe", "gemma4_text"])
def test_perplexity_counts_what_a_family_does_to_its_logits(family: str) -> None:
    model = headed(family)
    stream = LayerStream(model, BATCHES)
    found = CondensedSets(lambda: stream, {}, at_once).perplexity([()])
    assert found == pytest.approx([brute_force_perplexity(model, BATCHES)], rel=1e-6)


@pytest.mark.parametrize("beam", [1, 99])
def test_layers_by_predictions_are_those_of_an_exhaustive_search(measured, beam: int) -> None:
    model, _, found = measured
    batches = [tiny_batch(seed=seed, padding=False) for seed in range(3)]
    profile = Documents(model, batches)
    plan = profile.plan(found, beam=beam)
    experts = experts_of(plan)
    statistics = {layer.info.index: layer for layer in found}
    _, choosing = to_fit_and_choose(9)
    chosen = [one_document(batches, place) for place in choosing]
    intact = references.logits_of(model, chosen)

    def value(one: tuple[int, ...]) -> float:
        changed = with_condensed(model, {i: experts[i] for i in one}, statistics)
        return brute_force_logits_kl(intact, references.logits_of(changed, chosen), chosen)

    if beam == 1:
        first = min((1, 2, 3), key=lambda index: value((index,)))
        order = min(((first, i) for i in (1, 2, 3) if i != first), key=value)
        assert plan.layer_order == order
        assert plan.layer_divergence[0] == pytest.approx(value(order[:1]), rel=1e-5)
    best = min([(1, 2), (1, 3), (2, 3)], key=value)
    assert beam == 1 or set(plan.layer_order) == set(best)
    assert plan.layer_divergence[1] == pytest.approx(value(plan.layer_order), rel=1e-5)


def one_document(batches: list[dict], place: int) -> dict:
    row = slice(place % 3, place % 3 + 1)
    return {name: value[row] for name, value in batches[place // 3].items()}


class Documents:
    """A profile's way to documents, three in each batch, that notes what was asked of it."""

    def __init__(self, model, batches: list[dict]):
        self.model, self.batches = model, batches
        self.opened: list[list[int] | None] = []
        self.asked: list[str] = []
        self.answers: dict[str, object] = {}

    def open_stream(self, num_samples=None, documents=None) -> LayerStream:
        self.opened.append(documents)
        if documents is None:
            return LayerStream(self.model, self.batches)
        return LayerStream(self.model, [one_document(self.batches, at) for at in documents])

    def remember(self, identity, work, code):
        key = json.dumps(identity, sort_keys=True)
        if key not in self.answers:
            self.asked.append(identity["question"])
            self.answers[key] = json.loads(json.dumps(work()))
        return self.answers[key]

    def plan(self, found, **options: object):
        number = sum(len(batch["input_ids"]) for batch in self.batches)
        profile = Profile(found, self.open_stream, remember=self.remember, num_documents=number)
        defaults = dict(num_layers=2, num_routed=2, experts="frequency", layers="greedy_logits")
        return Condense(**(defaults | options)).plan(profile)


def test_a_second_search_by_predictions_asks_nothing_and_a_longer_one_goes_on(measured) -> None:
    model, batches, found = measured
    profile = Documents(model, batches)
    first = profile.plan(found)
    assert [name for name in profile.asked if name != "experts"] == ["logits_kl"] * 2
    opened, asked = len(profile.opened), len(profile.asked)
    assert profile.plan(found).to_text() == first.to_text()
    assert (len(profile.opened), len(profile.asked)) == (opened, asked)
    longer = profile.plan(found, num_layers=3)
    assert profile.asked[asked:] == ["logits_kl"]
    assert longer.layer_order[:2] == first.layer_order
    assert longer.to_text() == Documents(model, batches).plan(found, num_layers=3).to_text()


def test_layers_are_chosen_on_documents_of_their_own(measured) -> None:
    model, batches, found = measured
    profile = Documents(model, batches)
    profile.plan(found)
    assert [one for one in profile.opened if one is not None] == [[2, 5, 8]]
    with pytest.raises(UserError, match="has 3 documents"):
        Documents(model, batches[:1]).plan(found)


def test_predictions_are_compared_some_positions_at_a_time(measured, monkeypatch) -> None:
    model, batches, _ = measured
    edits, sizes = some_edits(model), []
    asked, stream = [(1,), (2, 3)], LayerStream(model, batches)
    expected = CondensedSets(lambda: stream, edits, at_once).logits_kl(asked)
    monkeypatch.setattr(layer_search, "LOGITS_AT_ONCE", 4 * 96)
    stream = LayerStream(model, batches)  # which keeps nothing of the other's
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(output.numel())
    )
    found = CondensedSets(lambda: stream, edits, at_once).logits_kl(asked)
    handle.remove()
    assert found == pytest.approx(expected, rel=1e-9)
    positions = sum(int((batch["attention_mask"].sum(dim=1) - 1).sum()) for batch in batches)
    assert max(sizes) == 4 * 96 and sum(sizes) == 3 * positions * 96  # intact, and two sets
    kept = [value.shape[-1] for value in stream.cache._memory.values()]
    assert set(kept) == {32}, "hidden states alone are kept, no distribution"


@dataclass(frozen=True)
class AddVector(Edit):
    """The block gives a vector of the plan's."""

    kind = "add_vector"
    leaves_moe = False

    def restructure(self, standing, tensors) -> nn.Module:
        return Vector(tensors[self.name])


class Vector(nn.Module):
    def __init__(self, vector):
        super().__init__()
        self.vector = vector

    def forward(self, x):
        return self.vector.expand_as(x)


def test_any_edit_may_stand_in_a_layer_and_the_plans_tensors_reach_it(measured) -> None:
    model, batches, _ = measured
    names = {layer.info.index: layer.info.name for layer in moe_layers(model)}
    vector = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edits = {1: DropLayer(1, names[1]), 2: AddVector(2, names[2]), 3: ScaleExperts(3, names[3], 3)}
    stream, intact = LayerStream(model, batches), references.logits_of(model, batches)
    sets = CondensedSets(lambda: stream, edits, at_once, {names[2]: vector})
    changed = copy.deepcopy(model)
    changed.model.layers[1].mlp = Vector(torch.zeros(32, dtype=torch.float64))
    changed.model.layers[2].mlp = Vector(vector)
    changed.model.layers[3].mlp.experts.down_proj.data *= 3
    expected = brute_force_logits_kl(intact, references.logits_of(changed, batches), batches)
    assert sets.logits_kl([(1, 2, 3)]) == pytest.approx([expected], rel=1e-5)
    again = references.logits_of(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(intact, again, strict=True))
