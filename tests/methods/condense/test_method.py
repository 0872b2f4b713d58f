"""CD-MoE as a method: what it carries out, remembers and refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from condensing import brute_force_states, experts_of, planned, with_condensed
from families import tiny_model

from moe_lab.families import tiny as families
from moe_lab.methods.condense.base import shared_gate
from moe_lab.methods.condense.method import Condense
from moe_lab.models.activations import Activations
from moe_lab.models.checkpoint import Checkpoint
from moe_lab.models.edits.plan import apply_plan
from moe_lab.models.layers import moe_layers
from moe_lab.models.layerwise import LayerwiseModel
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.profile import Profile
from moe_lab.types import LayerInfo, UserError


def test_the_condensed_model_is_what_the_search_looked_at(searched) -> None:
    model, batches, statistics, _, plan = searched
    choices = {edit.index: list(edit.experts) for edit in plan.edited()}
    expected = with_condensed(model, choices, statistics)
    condensed = copy.deepcopy(model)
    apply_plan(condensed, plan)
    with torch.no_grad():
        torch.testing.assert_close(condensed(**batches[0]).logits, expected(**batches[0]).logits,
                                   rtol=1e-9, atol=1e-9)  # fmt: skip
    assert plan.edited()[0].shared_gate == shared_gate(statistics[plan.edited()[0].index])


def test_the_search_leaves_the_model_as_it_was(searched) -> None:
    model, batches, _, intact, _ = searched
    again = brute_force_states(model, batches)
    for one, other in zip(intact, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["experts", "layers"])
def test_random_follows_the_seed(measured, kind: str) -> None:
    def choice(seed: int):
        plan, _ = planned(measured, **{kind: "random"}, num_layers=1, seed=seed, num_routed=3)
        return experts_of(plan) if kind == "experts" else plan.layer_order

    assert choice(1) == choice(1)
    assert len({str(choice(seed)) for seed in range(6)}) > 1


def test_first_and_last_layers(measured) -> None:
    assert planned(measured, layers="first", experts=[0])[0].layer_order == (1, 2)
    assert planned(measured, layers="last", experts=[0])[0].layer_order == (3, 2)


def test_from_disk_with_no_memory_for_activations_it_finds_the_same(measured, tmp_path) -> None:
    model, batches, found = measured
    model.save_pretrained(tmp_path / "model")
    expected, _ = planned(measured, num_layers=3)

    def open_stream() -> LayerStream:
        cache = Activations(limit=0, folder=tmp_path)
        source = LayerwiseModel(Checkpoint(tmp_path / "model", "float64"))
        return LayerStream(source, batches, cache)

    plan = Condense(num_layers=3, num_routed=2).plan(Profile(found, open_stream))
    assert plan.to_text() == expected.to_text()


def test_what_was_found_before_is_not_searched_again(measured) -> None:
    model, batches, found = measured
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
    assert longer.to_text() == planned(measured, num_layers=3)[0].to_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_layers=9), "has 3 MoE layers"),
        (dict(num_layers=0), r"condense.num_layers=0: it must be at least 1"),
        (dict(num_routed=9), "has 8 routed experts"),
        (dict(num_routed=-1), r"condense.num_routed=-1: it must be at least 0"),
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


def test_gpt_oss_is_condensed_in_its_own_block() -> None:
    infos = [layer.info for layer in moe_layers(tiny_model("gpt_oss"))]
    Condense(1, 2, "greedy_js", "greedy_js").check(infos)


def test_experts_that_end_in_a_norm_cannot_be_condensed_and_it_says_why() -> None:
    infos = [layer.info for layer in moe_layers(tiny_model("gpt_oss"))]
    infos = [replace(info, obstacle="each of its experts ends in a norm") for info in infos]
    with pytest.raises(UserError, match=r"layer 0 cannot be condensed: each .* norm"):
        Condense(1, 2, "greedy_js", "greedy_js").check(infos)


@pytest.mark.parametrize(
    ("family", "words"),
    [("zaya", "prev_router_hidden_states"), ("deepseek_v4", "does more with its MoE block's")],
)
def test_families_in_which_no_search_can_add_up_are_refused_in_words(
    family: str, words: str
) -> None:
    model, batches = families.tiny_model(family), families.tiny_batches()
    statistics = collect_statistics(model, batches)
    method = Condense(1, 2)
    with pytest.raises(UserError, match=words):
        method.plan(Profile(statistics, lambda: LayerStream(model, batches)))
