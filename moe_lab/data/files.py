"""Local files as a source: JSON, CSV, Parquet, plain text; how they are read is in reading.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from moe_lab.data.reading import PlacedRow, file_rows
from moe_lab.data.rows import Rows
from moe_lab.option import Option
from moe_lab.types import UserError


@dataclass(frozen=True)
class Files(Rows):
    """Local files: JSON lines, JSON arrays, CSV, TSV and Parquet (rows with fields), or plain text.

    All but Parquet may be packed (.gz, .zst, .bz2, .xz). A plain text file is one document in the
    field "text"; blank lines do not separate.
    """

    files: Annotated[
        tuple[str, ...], Option("paths, such as [a.jsonl,b.csv.gz,c.parquet,d.txt]")
    ] = ()

    def rows(self) -> Iterable[PlacedRow]:
        if not self.files:
            raise UserError("no files were named: calibration.files=[a.jsonl,b.parquet,c.txt]")
        for name in self.files:
            if not name.strip():
                raise UserError(f"calibration.files names {name!r}, which is no file")
            yield from file_rows(Path(name).expanduser(), self.field)

    def describe(self) -> str:
        return ", ".join(self.files)
