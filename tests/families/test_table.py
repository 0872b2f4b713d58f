"""The table says what the checks found, and pages keep what stands around it."""

from __future__ import annotations

from tempfile import gettempdir

import pytest
from rich.console import Console

from moe_lab.families.all_types import Row
from moe_lab.families.checks import CHECKS
from moe_lab.families.outcome import Outcome
from moe_lab.families.table import (
    COUNT_MARKS,
    TABLE_MARKS,
    counts,
    markdown,
    sentences,
    states_in,
    terminal_table,
    with_table,
)

WORKS = {name: Outcome("yes") for name in CHECKS} | {"prune": Outcome("stock")}
ROWS = [
    Row("good", "AutoModelForCausalLM", WORKS, 2.0),
    Row(
        "bad",
        "AutoModelForCausalLM",
        WORKS
        | {
            "prune": Outcome("silent", "off by a | b"),
            "merge": Outcome("refused", "not so"),
            "unequal": Outcome("refused", "not so"),
            "condense": Outcome("own", unchecked="no rows"),
        },
    ),
    Row(
        "seeing",
        "AutoModelForImageTextToText",
        dict.fromkeys(CHECKS, Outcome("not built", "too <large>")),
    ),
    Row(
        "lost",
        "AutoModelForSeq2SeqLM",
        {
            "find": Outcome(
                "refused",
                f"{gettempdir()}/moe_lab_families_x1/lost/dense is not a model that can be read",
            )
        },
    ),
]
PAGE = f"before\n{TABLE_MARKS[0]}\nold\n{TABLE_MARKS[1]}\nbehind\n"


def test_cells_and_sentences() -> None:
    told = states_in(with_table(PAGE, ROWS))
    assert told.keys() == {"good", "bad", "seeing", "lost"}
    assert told["good"]["prune"] == "stock" and told["good"]["find"] == "yes"
    assert (told["bad"]["prune"], told["bad"]["condense"]) == ("SILENT", "own*")
    assert set(told["seeing"].values()) == {"not built"}
    assert (told["lost"]["find"], told["lost"]["merge"]) == ("refused", "–")
    text = "\n".join(sentences(ROWS))
    assert "- bad, prune: off by a \\| b" in text
    assert "- bad, merge, unequal: not so" in text
    assert "- bad, condense: no rows" in text
    assert "too &lt;large>" in text
    assert "- lost, find: the checkpoint is not a model" in text, "no path of this machine"


def test_the_worst_comes_first() -> None:
    titles = [text.split("\n")[0] for text in sentences(ROWS)]
    assert titles[0].startswith("**Wrong without a word") and len(titles) == 4


def test_counts() -> None:
    text = counts(ROWS)
    assert "Causal language models: of 2 types 1 can be profiled" in text and "; 1 can" in text
    assert "With images, video or audio: of 1 types 0 " in text
    assert "Silent differences: 1." in text


def test_a_page_keeps_what_stands_around() -> None:
    made = with_table(PAGE, ROWS)
    assert made.startswith("before\n") and made.endswith("\nbehind\n") and "old" not in made
    assert with_table(made, ROWS) == made
    page = f"a\n{COUNT_MARKS[0]}\n{COUNT_MARKS[1]}\nb\n"
    assert "Silent differences" in with_table(page, ROWS)
    assert "|" not in with_table(page, ROWS)


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has no line"):
        with_table("nothing", ROWS)


def test_it_is_the_versions_that_are_told_and_no_date() -> None:
    import transformers

    assert markdown(ROWS).startswith(f"transformers {transformers.__version__}, torch ")


def test_a_terminal_shows_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=200).print(terminal_table(ROWS))
    shown = capsys.readouterr().out
    assert all(row.name in shown for row in ROWS) and "SILENT" in shown
