"""Reports to be tabled, and the cells of tables."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from moe_lab.report.frame import read_reports
from moe_lab.report.report import write_report
from moe_lab.tables.outputs import make_table
from moe_lab.tables.pivot import Request
from moe_lab.tables.table import Table

ACCURACY = {(2, 0): 0.80, (2, 1): 0.83, (2, 2): 0.79, (4, 0): 0.60, (4, 1): 0.71, (4, 2): 0.64}


def write(folder: Path, number: int, **given: Any) -> None:
    one = {"status": "ok", "error": None, "model": "tiny", "method": "condense"}
    one |= {key.replace("__", "/"): value for key, value in given.items()}
    one |= {"commit": "abc", "sweep": "s", "job": f"job {number}"}
    (folder / str(number)).mkdir(parents=True)
    write_report(folder / str(number), one)


def made_of(folder: Path, **request: Any) -> Table:
    return make_table(read_reports(folder), Request(**request))


def parsed(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
