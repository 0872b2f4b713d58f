"""docs/options.md and the help's most used values: of conf/ and the code as they are."""

from __future__ import annotations

import pytest
from running import ROOT, load_module

from moe_lab.option import declared_by
from moe_lab.runs.options import TopOptions

page = load_module("options_page", ROOT / "docs" / "options.py")


def without_help(group: str) -> list[str]:
    """The options of a group, by the names that users set, of which nothing says what they are."""
    rows = (row for name in page.choices(group) for row in page.rows_of(group, name))
    return [row.name for row in rows if not row.help]


def test_the_page_and_the_help_are_those_of_the_code() -> None:
    """After a change of conf/ or of a signature: python docs/options.py."""
    assert page.PAGE.read_text(encoding="utf-8") == page.page()
    text = page.HELP.read_text(encoding="utf-8")
    assert text == page.with_help(text)


def test_every_group_is_on_the_page() -> None:
    groups = {path.name for path in page.CONF.iterdir() if path.is_dir()}
    assert page.GROUPS.keys() == groups - {"hydra"}


@pytest.mark.parametrize("group", page.GROUPS)
def test_every_option_has_a_help(group: str) -> None:
    assert without_help(group) == []


def test_options_without_a_group_have_a_help() -> None:
    rows = page.top_rows()
    assert {row.name for row in rows} > declared_by(TopOptions).keys() | {"table.rows"}
    assert [row.name for row in rows if not row.help] == []


def test_names_are_those_that_a_user_sets() -> None:
    rows = {row.name: row for row in page.rows_of("finetune", "seer")}
    assert {"finetune.entropy", "calibration@finetune.phases.lm.data"} < rows.keys()
    seed = rows["finetune.phases.lm.data.seed"]
    assert (seed.value, seed.help) == (1, "of the choice of documents, where there is one")
    assert "finetune.phases.lm.data.pack" not in rows, "the source's own, told in its group"
    inherited = {row.name: row.value for row in page.rows_of("finetune", "seer_sst5")}
    assert inherited["finetune.trains"] == "routers" and "finetune.entropy" not in inherited
    assert inherited["finetune.phases.lm"] is None


def test_a_cell_shows_what_stands_in_a_yaml() -> None:
    rows = {row.name: row for group in ("eval", "model", "compute")
            for name in page.choices(group) for row in page.rows_of(group, name)}  # fmt: skip
    assert rows["eval.num_items"].cells() == [
        "`eval.num_items`", "a whole number", "`200`", "at least 1", "items of each embedded task",
    ]  # fmt: skip
    assert rows["compute.layerwise"].cells()[1:4] == [
        "text or true or false", "`auto`", "auto, true, false",
    ]  # fmt: skip
    assert {row.name: row for row in page.rows_of("model", "checkpoint")}["model.path"].cells()[
        2
    ] == "must be given"
