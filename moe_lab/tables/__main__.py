"""`python -m moe_lab.tables FOLDER`: one table from every report.json below a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from moe_lab.report.figures import FIGURES
from moe_lab.report.frame import read_reports
from moe_lab.tables.outputs import ENDINGS, make_comparison, make_table, write_outputs
from moe_lab.tables.pivot import Request
from moe_lab.types import UserError

TERMINAL = "terminal"


def _keys(text: str) -> list[str]:
    return [key for key in text.split(",") if key]


def _filter(text: str) -> tuple[str, list[str]]:
    key, sign, values = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE[,VALUE]")
    return key, values.split(",")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.tables",
        description="One table from every report.json in a folder. Keys are those of report.json.",
        epilog="Example: python -m moe_lab.tables outputs/runs/mine --rows metric --columns ratio "
        "--values compressed/eval/average,compressed/kl --baseline metric=random",
    )
    parser.add_argument("folder", type=Path, help="a sweep, a run, or a folder of them")
    _add_what_is_shown(parser)
    _add_where_it_goes(parser)
    asked = parser.parse_args(given)
    _refuse_what_does_not_go_together(parser, asked)
    return asked


def _add_what_is_shown(parser: argparse.ArgumentParser) -> None:
    for name, text in (
        ("rows", "settings that make rows; default: those that differ"),
        ("columns", "settings to spread over columns"),
        ("values", f"figures; default: {', '.join(one.title for one in FIGURES if one.columns)}"),
        ("sort", "keys of rows or values to sort by, --sort=-KEY for descending; default: as run"),
        ("best", "the best is bold among rows alike in these; default: model and size; '': of all"),
    ):
        parser.add_argument(f"--{name}", type=_keys, metavar="KEY,KEY", help=text)
    parser.add_argument(
        "--baseline", action="append", metavar="dense|KEY=VALUE,KEY=VALUE",
        help="differences (and if they are more than chance) to the dense model, or to the cell "
        "with these settings; may be repeated",
    )  # fmt: skip
    only: dict[str, Any] = {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE,VALUE",
        "type": _filter,
    }
    parser.add_argument("--filter", help="only reports with one of these; may be repeated", **only)
    parser.add_argument(
        "--expected", metavar="FILE",
        help="compare with published figures instead: a CSV file with columns figure, value, "
        "tolerance, and a column for each setting that picks the reports",
    )  # fmt: skip


def _add_where_it_goes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=(*ENDINGS.values(), TERMINAL))
    parser.add_argument("--output", type=Path, help="a file .md, .csv or .tex, instead of printing")
    parser.add_argument(
        "--write", action="store_true",
        help="tables in all formats, pictures and index.html into the folder, as a sweep does at "
        "its end; without other options the table that it was asked for",
    )  # fmt: skip


def _refuse_what_does_not_go_together(
    parser: argparse.ArgumentParser, asked: argparse.Namespace
) -> None:
    if asked.write and (asked.output or asked.format):
        parser.error("--write makes all formats in the folder: leave out --output and --format")
    if (
        asked.expected
        and not asked.write
        and any(
            getattr(asked, name)
            for name in ("rows", "columns", "values", "sort", "best", "baseline")
        )
    ):
        parser.error("--expected is a table of its own: of the other options it takes --filter")
    if asked.output and not asked.format and asked.output.suffix.lower() not in ENDINGS:
        parser.error(f"--output {asked.output}: it ends in {', '.join(ENDINGS)}, or say --format")


def _request(asked: argparse.Namespace) -> Request:
    names = ("rows", "columns", "values", "baseline", "best", "expected", "sort")
    return Request(**{name: getattr(asked, name) for name in names}, filters=dict(asked.filter))


def _of_sweep(folder: Path) -> Request:
    """What a sweep itself was asked to show, where it has left that."""
    path = folder / "multirun.yaml"
    whole: Any = OmegaConf.load(path) if path.is_file() else {}
    node = whole.get("table")
    asked: Any = OmegaConf.to_container(node, resolve=True) if node else {}
    return Request(**{key: value for key, value in asked.items() if key != "_target_"})


def main(given: Sequence[str] | None = None) -> int:
    """The command; 2 where what was asked for is not there."""
    asked = _arguments(given)
    try:
        _do(asked, _request(asked))
    except BrokenPipeError:  # who reads has seen enough
        sys.stdout = None
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _do(asked: argparse.Namespace, request: Request) -> None:
    if asked.write:
        of_sweep = request if request != Request() else _of_sweep(asked.folder)
        for path in write_outputs(asked.folder, of_sweep)[0]:
            print(path)
        return
    frame = read_reports(asked.folder)
    table = (make_comparison if request.expected else make_table)(frame, request)
    form = asked.format or (TERMINAL if sys.stdout.isatty() else "markdown")
    if asked.output and not asked.format:
        form = ENDINGS[asked.output.suffix.lower()]
    if form == TERMINAL:
        with asked.output.open("w", encoding="utf-8") if asked.output else nullcontext() as file:
            table.show(file)
    elif asked.output:
        asked.output.write_text(getattr(table, form)(), encoding="utf-8")
    else:
        print(getattr(table, form)(), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
