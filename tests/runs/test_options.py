"""Options are checked, and a message names what the user set."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lab import types
from moe_lab.runs import options


def checked(options_: dict[str, Any], raw: dict[str, Any] | None = None) -> None:
    top = {"seed": 0, "store": "a", "run_dir": "b", "resume": False}
    options.check_request(top | options_, top | (raw or options_), ["method", "condense", "metric"])


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_only_finite_numbers_are_numbers(value: Any) -> None:
    uniform = {"_target_": "moe_lab.methods.ratios.uniform.Uniform", "ratio": value}
    with pytest.raises(types.UserError, match=r"metric.ratio=.*a number"):
        checked({"metric": uniform})
    checked({"metric": uniform | {"ratio": 1}})
