"""What is printed is shown as it is."""

from __future__ import annotations

import io

import pytest
from rich.table import Table

from moe_lab.console import terminal

ODD = [
    "/a/[x]/b",
    "[/a/b]",
    "[bold]b[/bold]",
    ":fire:",
    "a\\[b]",
    "[link=x]y",
    "é[/]日本",
    "%s {0} $x",
]


@pytest.mark.parametrize("text", ODD)
def test_text_stays_as_it_is(text: str) -> None:
    out = io.StringIO()
    console = terminal(out, width=100)
    console.print(text, soft_wrap=True)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    assert out.getvalue().count(text) == 4
