"""Options as signatures declare them: their ranges, in words and as refusals."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pytest

from moe_lab.option import Option, Plugin, check_options, declared_by, word_of
from moe_lab.types import UserError


@dataclass(frozen=True)
class Base:
    ratio: Annotated[float, Option("share", least=0, below=1)]
    floor: Annotated[int | None, Option("floor", least=1)] = None


@dataclass(frozen=True)
class Whole(Base):
    error: Annotated[str, Option("what is measured", among=("kl", "output"))] = "kl"
    layers: str | Annotated[Sequence[int], Option("layers", least=0)] = "all"
    untold: bool = True


def plain(power: Annotated[float, Option("a power", above=0, most=3)], name: str = "a") -> None:
    """A function as a `_target_`."""


class Plain:
    """A class that is no dataclass."""

    def __init__(self, size: Annotated[int, Option("size", least=1, most=4)] = 2):
        self.size = size


def test_signatures_are_read_whatever_they_belong_to() -> None:
    found = declared_by(Whole)
    assert list(found) == ["ratio", "floor", "error", "layers", "untold"]
    assert found["ratio"].kind is float and found["ratio"].default is inspect.Parameter.empty
    assert found["floor"].nullable and not found["ratio"].nullable
    assert found["layers"].kind == str | Sequence[int]
    assert found["layers"].option == Option("layers", least=0)
    assert found["untold"].option is None
    assert declared_by(plain)["power"].option == Option("a power", above=0, most=3)
    assert declared_by(plain)["name"].default == "a"
    assert declared_by(Plain)["size"].kind is int


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 1.0}, "ratio.ratio=1.0: it must be at least 0, below 1"),
        ({"ratio": -0.1}, "ratio.ratio=-0.1: it must be at least 0, below 1"),
        ({"floor": 0}, "ratio.floor=0: it must be at least 1, or null"),
        ({"error": "js"}, "ratio.error=js: there are kl, output"),
        ({"layers": [3, -1]}, "ratio.layers=[3,-1]: it must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        check_options(Whole(**{"ratio": 0.5} | given), "ratio")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "given",
    [{"ratio": 0}, {"ratio": 0.999}, {"floor": None}, {"floor": 1}, {"error": "output"},
     {"layers": "first"}, {"layers": [0]}, {"untold": False}],
)  # fmt: skip
def test_values_in_range_are_taken(given: dict[str, object]) -> None:
    check_options(Whole(**{"ratio": 0.5} | given), "ratio")


def test_other_objects_are_refused_by_their_attributes() -> None:
    check_options(Plain(4), "track")
    with pytest.raises(UserError, match=r"track\.size=5: it must be from 1 to 4"):
        check_options(Plain(5), "track")
    hidden = Plain(4)
    del hidden.size
    check_options(hidden, "track")


def test_ranges_in_words() -> None:
    assert Option("", least=1, most=4).range() == "from 1 to 4"
    assert Option("", above=0, below=0.5).range() == "above 0, below 0.5"
    assert Option("", most=2).range() == "at most 2"
    assert Option("").range() == ""
    assert Option("", among=(None, "copy", True)).range() == "null, copy, true"
    assert not Option("", among=(1,)).allows(True), "equal to Python, not to a user"


def test_values_as_a_user_writes_them() -> None:
    values = (None, True, 0.5, "a", [1, None], ("a", "b"))
    assert [word_of(value) for value in values] == ["null", "true", "0.5", "a", "[1,null]", "[a,b]"]


def test_a_report_says_what_is_given_and_plain() -> None:
    options = {"_target_": "a.b", "ratio": 0.5, "floor": None, "metric": {"power": 1}, "kept": [1]}
    assert Plugin.settings(options) == {"ratio": 0.5, "kept": [1]}
    assert Plugin().identity(options) == options


def test_names_of_files_are_listed_where_they_are_values() -> None:
    found = Option("", files_of=("moe_lab.methods.condense.gates",))
    assert found.range() == "mean_all, mean_selected" and found.allows("research.mine")
    grouping = Option("", files_of=("moe_lab.methods.grouping", "base", "alignment"))
    assert grouping.range() == "hc_smoe, m_smoe, mergemoe, ream"
