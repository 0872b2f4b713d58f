"""Plug-ins by a config group or by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from moe_lab.chosen import ChosenBy, all_options
from moe_lab.methods.factorizing.base import NO_FORMS, Factorization
from moe_lab.methods.factorizing.cp import CP
from moe_lab.types import UserError

FORMS: ChosenBy[Factorization] = ChosenBy(
    "form", "moe_lab.methods.factorizing", Factorization, NO_FORMS
)


@dataclass(frozen=True)
class Needing(CP):
    """One whose option has no default."""

    often: int = 1

    def __init__(self, often: int) -> None: ...


def test_by_name_by_path_and_as_an_object() -> None:
    assert FORMS.made("cp") == CP() == FORMS.made("moe_lab.methods.factorizing.cp.CP")
    assert FORMS.made(CP(sweeps=3)).sweeps == 3
    with pytest.raises(UserError, match=r"method\.form='cpp'"):
        FORMS.made("cpp")
    with pytest.raises(UserError, match="form"):
        FORMS.made(3)


def test_a_name_without_all_defaults_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lab.methods.factorizing.cp.CP", Needing)
    with pytest.raises(
        UserError, match=r"has no default for often: write a yaml.*form/<name>.yaml"
    ):
        FORMS.made("moe_lab.methods.factorizing.cp.CP")


def test_what_a_report_says() -> None:
    node = {"_target_": "moe_lab.methods.factorizing.cp.CP", "sweeps": 4, "seed": 2}
    assert FORMS.described(node) == {"form": "cp", "sweeps": 4, "seed": 2}
    assert FORMS.described("cp") == {"form": "cp", "sweeps": 10, "start": "svd", "seed": 0}
    assert FORMS.described("none") == {"form": "none"}, "refused later"
    assert all_options(CP(), node) == {"sweeps": 4, "start": "svd", "seed": 2}
