"""All places in which a sweep's figures are told, of three made-up jobs: `python told_figures.py`.

Run on a copy of the code it tells what that copy shows.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any


def write_jobs(folder: Path, further: Sequence[str]) -> None:
    """Reports of three shares removed; further: figures that they have besides."""
    from moe_lab.report.report import write_report

    for number, ratio in enumerate((0.25, 0.5, 0.75)):
        one = {"status": "ok", "model": "tiny", "method": "prune", "ratio": ratio}
        for variant in ("dense", "compressed"):
            share = 1 if variant == "dense" else 1 - ratio
            values = {"eval/average": 0.9 * share, "kl": 1 - share, "parameter_ratio": share}
            values |= dict.fromkeys(further, 12000000 * share)
            one |= {f"{variant}/{name}": value for name, value in values.items()}
        (folder / str(number)).mkdir()
        write_report(folder / str(number), one)


def help_of(parse: Callable[[list[str]], Any]) -> str:
    """What a command's --help says, in one line."""
    with redirect_stdout(StringIO()) as said, suppress(SystemExit):
        parse(["--help"])
    return " ".join(said.getvalue().split())


def page_data(page: Path) -> dict[str, Any]:
    """What lies in a page for its scripts."""
    _, _, rest = page.read_text(encoding="utf-8").partition('id="sweep">')
    data: dict[str, Any] = json.loads(rest.partition("</script>")[0])
    return data


def told(root: Path, further: Sequence[str] = ()) -> dict[str, list[str]]:
    """What each place tells of figures, in its order. root: the checkout whose docs are meant."""
    from moe_lab.report.frame import read_reports
    from moe_lab.report.page.page import write_page
    from moe_lab.report.plots.sweep import DRAWN_COSTS, draw_sweep
    from moe_lab.report.report import read_report
    from moe_lab.report.summary import result_markdown, result_rows
    from moe_lab.tables.__main__ import _arguments
    from moe_lab.tables.outputs import make_table
    from moe_lab.tables.pivot import Request

    spec = importlib.util.spec_from_file_location("written_tables", root / "docs" / "figures.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    reference = root / "docs" / "reference.md"
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_jobs(folder, further)
        frame, report = read_reports(folder), read_report(folder / "1")
        page = page_data(write_page(folder))
        columns = [one for one in page["columns"] if one["shown"] is not None]
        return {
            "console": [" | ".join(row) for row in result_rows(report)],
            "card": result_markdown(report).splitlines(),
            "table": make_table(frame, Request()).markdown().splitlines()[0].split(" | "),
            "help": help_of(_arguments).split(", "),
            "page": [f"{one['key']} {one['better']} {one['texts'][-1]}" for one in columns],
            "titles": list(page["titles"].values()),
            "costs": page["costs"],
            "pictures": [path.stem for path in draw_sweep(folder, frame)],
            "labels": [cost.unit.in_picture(cost.title) for cost in DRAWN_COSTS],
            "docs": docs.with_tables(reference.read_text(encoding="utf-8")).splitlines(),
        }


if __name__ == "__main__":
    print(json.dumps(told(Path.cwd(), sys.argv[1:])))
