"""Options are checked, and a message names what the user set."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from moe_lab import types
from moe_lab.evaluate.suite import Suite
from moe_lab.option import declared_by
from moe_lab.runs import options

TOP: dict[str, Any] = {
    "seed": 0, "store": "a", "run_dir": "b", "resume": False, "dry_run": False, "objectives": None,
}  # fmt: skip


def checked(options_: dict[str, Any], raw: dict[str, Any] | None = None) -> None:
    options.check_request(TOP | options_, TOP | (raw or options_), ["method", "condense", "metric"])


def test_a_message_names_what_the_user_set() -> None:
    target = "moe_lab.methods.condense.method.Condense"
    good = {"_target_": target, "num_layers": 1, "num_routed": 0, "experts": "a", "layers": [1, 2]}
    raw = good | {"num_layers": "${condense.num_layers}"}
    checked({"method": good, "condense": {"num_layers": 1}})
    for value in ("abc", 1.5, True, None):
        values = {"method": good | {"num_layers": value}, "condense": {"num_layers": value}}
        with pytest.raises(types.UserError, match=r"^condense.num_layers=.*a whole number"):
            checked(values, {"method": raw, "condense": {"num_layers": value}})
    with pytest.raises(types.UserError, match=r"^method.layers=.*text or a list \[a,b\] of whole"):
        checked({"method": good | {"layers": ["x"]}})
    with pytest.raises(
        types.UserError, match=r"method\.num_layer is no option; there are num_layers"
    ):
        checked({"method": good | {"num_layer": 1}})
    with pytest.raises(types.UserError, match=r"Pruner does not exist"):
        checked({"method": {"_target_": "moe_lab.methods.prune.Pruner"}})


def test_a_value_out_of_range_is_named_as_the_user_set_it() -> None:
    phase = {"_target_": "moe_lab.finetune.recipe.Phase", "data": None, "epochs": 0}
    data = {"_target_": "moe_lab.data.files.Files", "num_samples": 1, "max_length": 1}
    phases = {"lm": phase | {"data": data}}
    seer = {"_target_": "moe_lab.finetune.seer.Seer", "phases": phases}
    with pytest.raises(types.UserError, match=r"^method\.phases\.lm\.epochs=0: .* at least 1$"):
        checked({"method": seer})
    phases["lm"] = {"_target_": phase["_target_"], "data": data | {"num_samples": -1}}
    raw = {"lm": {"_target_": "", "data": data | {"num_samples": "${condense.num_samples}"}}}
    options_ = {"method": seer, "condense": {"num_samples": -1}}
    with pytest.raises(types.UserError, match=r"^condense\.num_samples=-1: .* at least 1$"):
        checked(options_, options_ | {"method": seer | {"phases": raw}})
    phases["lm"] = {"_target_": phase["_target_"], "data": data}
    for name, value, words in (
        ("top_k", 0, "at least 1, or null"),
        ("annealing", "slow", "there are linear, staircase, at_once"),
        ("twins", -0.5, "at least 0"),
    ):
        with pytest.raises(types.UserError, match=rf"^method\.{name}={value}: .*{words}$"):
            checked({"method": seer | {name: value}})
    checked({"method": seer | {"top_k": None, "twins": 0}})


def test_a_range_holds_in_lists_and_beside_other_kinds() -> None:
    suite = {"_target_": "moe_lab.evaluate.suite.Suite"}
    with pytest.raises(types.UserError, match=r"^metric\.top_k=\[2,0\]: it must be at least 1"):
        checked({"metric": suite | {"top_k": [2, 0]}})
    compute = {"_target_": "moe_lab.compute.Compute"}
    with pytest.raises(types.UserError, match=r"^metric\.layerwise=no: there are auto, true, fa"):
        checked({"metric": compute | {"layerwise": "no"}})
    with pytest.raises(types.UserError, match=r"^metric\.layerwise=1: .*text or true or false"):
        checked({"metric": compute | {"layerwise": 1}})
    checked({"metric": compute | {"layerwise": True}})


def test_the_options_of_a_model_and_those_without_a_group_are_checked() -> None:
    model = {"name": "a", "path": "b", "revision": None, "dtype": "auto"}
    top = TOP | {"model": model}
    options.check_request(top, top, ["model"])
    for name, value, words in (
        ("seed", -1, "seed=-1: it must be from 0 to 4294967295"),
        ("resume", "no", "resume=no: it must be true or false"),
        ("model", model | {"path": 3}, "model.path=3: it must be text"),
        ("model", model | {"path": "???"}, "model.path must be given"),
        ("model", model | {"pat": "x"}, "model.pat is no option; there are name, path"),
    ):
        with pytest.raises(types.UserError, match=words):
            options.check_request(top | {name: value}, top | {name: value}, ["model"])


def test_kinds_in_words() -> None:
    found = declared_by(Suite)
    assert options.kind_in_words(found["top_k"].kind) == "a list [a,b] of whole numbers or null"
    assert options.kind_in_words(found["held_out"].kind) == "a source or null"
    assert options.kind_in_words(found["metrics"].kind) == "a mapping or null"
    assert options.kind_in_words(Annotated[float, "anything"]) == "a number"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_only_finite_numbers_are_numbers(value: Any) -> None:
    uniform = {"_target_": "moe_lab.methods.ratios.uniform.Uniform", "ratio": value}
    with pytest.raises(types.UserError, match=r"metric.ratio=.*a number"):
        checked({"metric": uniform})
    checked({"metric": uniform | {"ratio": 0}})
