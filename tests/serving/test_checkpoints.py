"""What is said of a checkpoint that is served."""

from __future__ import annotations

from moe_lab.serving.checkpoints import Served


def test_each_has_its_form_and_family(few: list[Served]) -> None:
    assert [one.form for one in few] == [
        "native",
        "native, fewer experts",
        "own form, unequal experts",
    ]
    assert {one.family for one in few} == {"mixtral"}
    assert [one.name for one in few][2] == "random mixtral / unequal"
    assert len({one.key for one in few}) == 3
