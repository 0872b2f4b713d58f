"""docs/models.md: of conf/model/ and the code as they are."""

from __future__ import annotations

import pytest
from real_models import REAL
from running import ROOT, load_module

page = load_module("models_page", ROOT / "docs" / "models.py")
TEXT = page.PAGE.read_text(encoding="utf-8")
# One each of those whose results are stock, with zeros, our own form, or refused.
LOOKED_AT = ("olmoe_1b_7b", "qwen1_5_moe_a2_7b", "mixtral_8x7b", "gpt_oss_20b", "deepseek_v2_lite")


def test_every_model_of_the_hub_is_in_both_tables() -> None:
    assert list(page.models()) == list(REAL)
    tables = {name: TEXT.split(page.MARKS[0].format(name))[1] for name in page.TABLES}
    for name, table in tables.items():
        lines = table.split(page.MARKS[1].format(name))[0].strip().splitlines()
        assert [line.split("`")[1] for line in lines[2:]] == list(REAL)


@pytest.mark.parametrize("name", REAL)
def test_what_a_model_is(name: str) -> None:
    """After a change of conf/model/: python docs/models.py."""
    assert page.row("models", name) in TEXT.splitlines()


@pytest.mark.parametrize("name", LOOKED_AT)
def test_the_forms_are_those_of_the_code(name: str) -> None:
    """After a change of what a form can say: python docs/models.py."""
    assert page.row("forms", name) in TEXT.splitlines()


def test_kept_experts_are_as_many_in_each_group() -> None:
    _, layers = page.built("deepseek_v3")
    assert (layers[0].num_experts, layers[0].groups) == (256, 8)
    [edit, *_] = page.METHODS["prune"](layers)
    assert [sum(e // 32 == group for e in edit.kept) for group in range(8)] == [16] * 8
