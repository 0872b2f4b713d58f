"""What hidden units compute, layer by layer, and what an output loses without some of them."""

from __future__ import annotations

import pytest
import torch
from families import tiny_batch, tiny_model
from slow_neurons import NEURON_FAMILIES, block_of, seen_by, slow_columns

from moe_lab.models.stream import LayerStream
from moe_lab.profile.hidden import HiddenStates, digest_of, hidden_by_expert, output_errors
from moe_lab.profile.profile import Profile


@pytest.mark.parametrize("family", NEURON_FAMILIES)
def test_routings_are_those_of_loops_over_tokens(family: str) -> None:
    model, batches = tiny_model(family), [tiny_batch(0), tiny_batch(1)]
    slow = [list(seen_by(model, batch)) for batch in batches]
    states = HiddenStates(LayerStream(model, batches))
    for index in sorted(states.stream.moe):
        for number, routing in enumerate(states.routings(index)):
            expected = sorted((o.expert, o.token, o) for o in slow[number] if o.layer == index)
            valid = batches[number]["attention_mask"].flatten().bool()
            row = (valid.cumsum(0) - 1).tolist()
            found = [
                (expert, token, weight, hidden)
                for expert, h_NI, weight_N, token_N in hidden_by_expert(routing, 8)
                for hidden, weight, token in zip(
                    h_NI, weight_N.tolist(), token_N.tolist(), strict=True
                )
            ]
            assert len(found) == len(expected)
            for (expert, token, weight, hidden), (_, _, one) in zip(
                sorted(found, key=lambda each: each[:2]), expected, strict=True
            ):
                assert (expert, token) == (one.expert, row[one.token])
                assert weight == pytest.approx(one.weight, rel=1e-5)
                torch.testing.assert_close(hidden.double(), one.hidden, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", NEURON_FAMILIES)
def test_an_outputs_error_is_that_of_the_terms_that_go(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch()
    generator = torch.Generator().manual_seed(0)
    some = {index: torch.rand(8, 16, generator=generator) < 0.6 for index in (1, 3)}
    whole = torch.ones(8, 16, dtype=torch.bool)
    sets = {index: [kept, whole] for index, kept in some.items()}
    profile = Profile([], lambda number=None: LayerStream(model, [batch]))
    found = output_errors(profile, None, sets)
    outputs = {
        index: [torch.zeros(30, 32, dtype=torch.float64) for _ in range(2)] for index in some
    }
    for one in seen_by(model, batch):
        if one.layer not in some:
            continue
        experts = block_of(model.model.layers[one.layer]).experts
        gone = ~some[one.layer][one.expert]
        columns = slow_columns(experts, one.expert)
        total, lost = outputs[one.layer]
        total[one.token] += one.weight * one.output
        lost[one.token] += one.weight * (one.hidden[gone] @ columns[gone])
    for index, (total, lost) in outputs.items():
        expected = float(lost.square().sum() / total.square().sum())
        assert found[index] == [pytest.approx(expected, rel=1e-4), 0.0]


def test_a_digest_tells_sets_apart() -> None:
    one = torch.tensor([[True, False], [True, True]])
    assert digest_of(one) == digest_of(one.clone())
    assert digest_of(one) != digest_of(one.roll(1))
    assert digest_of(one, None) == digest_of(one)
