"""The checks notice what is wrong: methods, statistics and searches of which one is spoilt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lab.families import checks, tiny
from moe_lab.families import family as families
from moe_lab.families.checks import CHECKS, check_type
from moe_lab.families.family import Family
from moe_lab.models.edits.condense import CondenseLayer
from moe_lab.models.edits.drop_layer import DropLayer
from moe_lab.models.edits.prune import PruneExperts
from moe_lab.types import UserError

Spoil = Callable[[str, Any, Any], None]


def test_a_family_that_keeps_the_contract(stock: Path, tmp_path: Path) -> None:
    outcomes = check_type("qwen2_moe", stock, tmp_path)
    assert {name: one.state for name, one in outcomes.items()} == {
        "find": "yes",
        "observe": "yes",
        "prune": "stock",
        "merge": "stock",
        "narrow": "stock",
        "narrow by expert": "own",
        "unequal": "own",
        "condense": "stock",
        "drop layers": "stock",
        "layer by layer": "yes",
        "image": "none",
    }
    assert not any(one.unchecked for one in outcomes.values())


def test_a_type_that_does_not_build_is_shown(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.SPECIAL, "mixtral", {"hidden_size": "odd"})
    outcomes = check_type("mixtral", stock, tmp_path)
    assert {one.state for one in outcomes.values()} == {"not built"}
    assert outcomes["find"].detail and outcomes.keys() == CHECKS.keys()


def test_a_type_that_stock_transformers_cannot_run_is_shown(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.SPECIAL, "mixtral", {"hidden_size": 33})
    outcomes = check_type("mixtral", stock, tmp_path)
    assert outcomes["find"].state == "not built" and "RuntimeError" in outcomes["find"].detail
    assert outcomes["observe"].state == "not reached"


def test_a_refusal_and_a_fault_end_no_other_check(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Family) -> None:
        raise UserError("not this one")

    def crash(_: Family) -> None:
        raise ZeroDivisionError("by zero")

    for name in ("merge", "condense", "layer by layer"):
        monkeypatch.setitem(CHECKS, name, lambda _: checks.NOT_REACHED)
    monkeypatch.setitem(CHECKS, "prune", refuse)
    monkeypatch.setitem(CHECKS, "unequal", crash)
    outcomes = check_type("qwen3_moe", stock, tmp_path)
    assert (outcomes["prune"].state, outcomes["prune"].detail) == ("refused", "not this one")
    assert outcomes["unequal"].state == "fault" and "by zero" in outcomes["unequal"].detail
    assert outcomes["drop layers"].state == "stock"


def test_layers_that_are_missed(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Family.layers
    monkeypatch.setattr(Family, "layers", lambda self: found(self)[1:])
    assert checks.find(family).state == "fault"


def test_counts_that_are_wrong(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = checks._judged_counts(
        family, {one.info.index: one["count"].long().roll(1) for one in family.statistics}
    )
    assert shifted.state == "silent"
    unseen = checks._judged_counts(family, {})
    assert unseen.state == "yes" and "[0, 1, 2, 3]" in unseen.unchecked


def test_the_wrong_experts_pruned(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan says one thing, the weights another."""
    plain = PruneExperts.restructure

    def other(self: PruneExperts, standing: Any, tensors: Any) -> Any:
        gone = sorted(set(range(8)) - set(self.kept))
        wrong = PruneExperts(self.index, self.name, tuple(sorted({*self.kept[len(gone) :], *gone})))
        return plain(wrong, standing, tensors)

    monkeypatch.setattr(PruneExperts, "restructure", other)
    outcome = checks.prune(family)
    assert outcome.state == "silent" and "not the reference's" in outcome.detail
    assert checks.unequal(family).state == "silent"


def test_gates_that_are_not_those_of_the_plan(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CondenseLayer.restructure

    def other(self: CondenseLayer, standing: Any, tensors: Any) -> Any:
        gates = tuple(gate * 1.01 for gate in self.gates)
        return plain(CondenseLayer(self.index, self.name, self.experts, gates), standing, tensors)

    assert checks.condense(family).state == "stock"
    monkeypatch.setattr(CondenseLayer, "restructure", other)
    assert checks.condense(family).state == "silent"


def test_a_dropped_layer_that_is_another(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.drop(family).state == "stock"
    plain = DropLayer.to_json
    monkeypatch.setattr(
        DropLayer,
        "to_json",
        lambda self: plain(self) | {"name": f"model.layers.{(self.index + 1) % 4}.mlp"},
    )
    assert checks.drop(family).state == "silent"


def test_a_tensor_that_prune_has_no_business_with(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = families.apply_plan

    def careless(model: Any, plan: Any) -> None:
        plain(model, plan)
        model.lm_head.weight.data[0, 0] += 1

    monkeypatch.setattr(families, "apply_plan", careless)
    outcome = checks.prune(family)
    assert outcome.state == "silent" and "lm_head.weight" in outcome.detail


def test_statistics_that_differ_layer_by_layer(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.layer_by_layer(family).state == "yes"
    plain = checks.collect_profile

    def other(*given: Any) -> Any:
        collection = plain(*given)
        next(iter(collection.found.values())).sums.update(gate_sum=torch.ones(8))
        return collection

    monkeypatch.setattr(checks, "collect_profile", other)
    outcome = checks.layer_by_layer(family)
    assert outcome.state == "silent" and "gate_sum" in outcome.detail


def test_an_image_that_is_answered_otherwise(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks.image(family).state == "none"
    monkeypatch.setattr(family, "takes_images", True)
    assert checks.image(family).unchecked
    monkeypatch.setattr(family, "image", family.batches[0])
    assert checks.image(family).state == "stock"
    plain = families.apply_plan

    def careless(model: Any, plan: Any) -> None:
        plain(model, plan)
        model.lm_head.weight.data += torch.ones(())

    monkeypatch.setattr(families, "apply_plan", careless)
    assert checks.image(family).state == "silent"
