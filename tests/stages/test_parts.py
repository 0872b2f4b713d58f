"""The objects that a composed config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, get_type_hints

import pytest
from hydra.utils import instantiate

from moe_lab.compute import Compute
from moe_lab.data.embedded import StandardLibrary
from moe_lab.methods.prune import Prune
from moe_lab.stages.parts import Parts
from moe_lab.types import UserError

make = partial(instantiate, _convert_="object")


def test_each_group_that_names_code_is_an_object(composed: Callable[..., Any]) -> None:
    whole = ("eval=tiny", "diagnose=full", "trace=full", "quantize=rtn")
    config = composed("method=prune", "finetune=experts", *whole)
    parts = Parts.made(config, make)
    assert isinstance(parts.compute, Compute) and type(parts.calibration) is StandardLibrary
    assert isinstance(parts.method, Prune), "with its metric and its ratio inside"
    hints = get_type_hints(Parts)
    left_out = [field.name for field in fields(Parts) if getattr(parts, field.name) is None]
    assert left_out == []
    for name in ("finetune", "quantize", "eval", "measure", "diagnose", "trace"):
        assert isinstance(getattr(parts, name), hints[name])


@pytest.mark.parametrize("group", ["finetune", "quantize", "eval", "measure", "diagnose", "trace"])
def test_what_is_left_out_is_none(group: str, composed: Callable[..., Any]) -> None:
    parts = Parts.made(composed(f"{group}=none"), make)
    assert getattr(parts, group) is None


class Unbased:
    """A method that does without the base of methods."""

    def plan(self, profile: object) -> None:
        """It plans nothing."""


@pytest.mark.parametrize(
    ("group", "given"), [("method", Unbased()), ("finetune", StandardLibrary(1, 8))]
)
def test_an_object_of_another_kind_is_refused(
    group: str, given: object, composed: Callable[..., Any]
) -> None:
    config = composed("method=none", "finetune=none")
    words = rf"^{group} is {type(given).__name__}, .*derived from moe_lab\."
    with pytest.raises(UserError, match=words):
        Parts.made(config, lambda node: given if node is config[group] else make(node))
