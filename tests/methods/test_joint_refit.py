"""The columns of a layer, all together or one expert after another."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from narrowing import narrow_plan
from refits import opened, text

from moe_lab.methods import joint_refit
from moe_lab.methods.joint_refit import CAUTIOUS, all_at_once, changes, part_by_part
from moe_lab.methods.ridge import Ridge
from moe_lab.models.edits.plan import Plan
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.models.layers import moe_layers
from moe_lab.profile.edited_layer import Part

ONE = (Ridge(1.0, "unit"),)  # the same for a unit, whoever it is found together with
BATCHES = [text(seed) for seed in range(3)]


def pruned(family: str):
    """Four experts of eight go from each layer."""
    model = tiny_model(family)
    infos = [layer.info for layer in moe_layers(model)]
    return model, Plan(tuple(PruneExperts(one.index, one.name, (1, 2, 4, 7)) for one in infos))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_one_after_another_goes_to_what_all_together_are(family: str) -> None:
    model, plan = pruned(family)
    with opened(model, BATCHES, plan, 2) as layer:
        joint = all_at_once(layer, ONE)
    off = []
    for sweeps in (1, 2, 40):
        with opened(model, BATCHES, plan, 2) as layer:
            found = part_by_part(layer, ONE, sweeps)
        whole = torch.cat([joint.columns[part] for part in layer.parts])
        apart = torch.cat([found.columns[part] for part in layer.parts]).double()
        off.append(float((apart - whole).norm() / whole.norm()))
    assert off[2] < 1e-3 < off[1] < 0.5 * off[0]
    assert found.error == pytest.approx(joint.error, rel=1e-3)


def test_which_way_it_is_done_follows_from_the_number_of_units(monkeypatch) -> None:
    model, plan = pruned("mixtral")
    for name in ("all_at_once", "part_by_part"):
        monkeypatch.setattr(joint_refit, name, lambda layer, ridges, name=name: name)
    with opened(model, BATCHES, plan, 1) as layer:
        assert layer.num_units == 64
        assert changes(layer, most=64) == "all_at_once"
        assert changes(layer, most=63) == "part_by_part"


@pytest.mark.parametrize("most", [0, 10_000])
def test_nothing_is_changed_where_nothing_is_missing(most: int) -> None:
    model = tiny_model("qwen2_moe")
    with opened(model, BATCHES, narrow_plan(model, (16,) * 8), 2) as layer:
        assert layer.square() == 0
        assert changes(layer, most=most) is None


@pytest.mark.parametrize("most", [0, 10_000])
def test_what_other_documents_do_not_confirm_is_left_out(most: int) -> None:
    """Noise is missing: whatever is fitted to it is wrong on the held-out documents."""
    model, plan = pruned("mixtral")
    generator = torch.Generator().manual_seed(0)
    with opened(model, BATCHES, plan, 1) as layer:
        for batch in range(len(BATCHES)):
            shape = layer._get(batch, "lacking").shape
            layer._put(batch, "lacking", torch.randn(shape, generator=generator))
        weak = (Ridge(1e-4), Ridge(1e-2))
        found = changes(layer, weak, most)
        assert found is None or len(found.ridges) < len(layer.parts)
        if most:
            assert found is None


def test_an_expert_that_no_token_gets_keeps_its_columns() -> None:
    model, plan = pruned("mixtral")
    for most in (0, 10_000):
        with opened(model, BATCHES, plan, 1) as layer:
            for batch in range(len(BATCHES)):
                place_TK = layer._get(batch, "place")
                layer._put(batch, "place", torch.where(place_TK == 3, 2, place_TK))
            found = changes(layer, most=most)
        assert not found.columns[Part(3, 16)].any()
        assert found.columns[Part(2, 16)].any()


def test_an_expert_without_held_out_tokens_is_changed_with_care() -> None:
    model, plan = pruned("mixtral")
    with opened(model, BATCHES, plan, 1) as layer:
        for batch in range(len(BATCHES)):
            place_TK, held_T = layer._get(batch, "place"), layer._get(batch, "held")
            gone_TK = held_T[:, None] & (place_TK == 3)
            layer._put(batch, "place", torch.where(gone_TK, 2, place_TK))
        found = changes(layer, ONE, most=0)
    assert set(found.ridges) == {*ONE, CAUTIOUS} and found.ridges.count(CAUTIOUS) == 1
    assert found.columns[Part(3, 16)].any()


def test_one_token_beside_the_held_out_ones_is_enough_to_go_on() -> None:
    model, plan = pruned("qwen2_moe")
    with opened(model, BATCHES, plan, 2) as layer:
        for batch in range(len(BATCHES)):
            held_T = torch.ones_like(layer._get(batch, "held"))
            held_T[0] = bool(batch)
            layer._put(batch, "held", held_T)
        for most in (10_000, 0):
            found = changes(layer, most=most)
            assert found is None or all(bool(c.isfinite().all()) for c in found.columns.values())


def test_the_ridge_is_chosen_on_documents_that_were_not_fitted() -> None:
    model, plan = pruned("qwen2_moe")
    few = (Ridge(1e-2), Ridge(1.0), Ridge(1e3))
    with opened(model, BATCHES, plan, 2) as layer:
        chosen, *each = (all_at_once(layer, some) for some in (few, *((one,) for one in few)))
    judged = {one.held_error: one.ridges for one in each if one is not None}
    assert chosen.ridges == judged[min(judged)] == (few[1],)
    assert chosen.error < chosen.held_error < 1
