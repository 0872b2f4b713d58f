"""The terminal: what is printed is shown as it is, and nothing of a user's is markup.

A path with [x] in it, a sweep named by its overrides or a model called :fire: are text to rich's
consoles alone where these say so; all of moe_lab print through this one.
"""

from __future__ import annotations

from typing import IO

from rich.console import Console


def terminal(file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console that takes text as it is: emphasis is said by `rich.text.Text`, never in brackets.

    file: in the place of standard output.
    """
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False)
