"""Local files as a source: JSON lines, Parquet, plain text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from moe_lab.data.rows import Rows
from moe_lab.option import Option
from moe_lab.types import UserError


@dataclass(frozen=True)
class Files(Rows):
    """Local files: JSON lines and Parquet (rows with fields) or plain text (one document each).

    A plain text file is one document in the field "text"; blank lines do not separate.
    """

    files: Annotated[tuple[str, ...], Option("paths, such as [a.jsonl,b.parquet,c.txt]")] = ()

    def rows(self) -> Iterable[tuple[str, Any]]:
        if not self.files:
            raise UserError("no files were named: calibration.files=[a.jsonl,b.parquet,c.txt]")
        for name in self.files:
            path = Path(name).expanduser()
            if not path.is_file():
                raise UserError(f"{path} is not a file (calibration.files)")
            for row in self._rows_or_refuse(path):
                yield str(path), row

    def _rows_or_refuse(self, path: Path) -> Iterator[Any]:
        try:
            yield from self._read(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def _read(self, path: Path) -> Iterator[Any]:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif path.suffix in (".jsonl", ".json"):
            # Not str.splitlines, which also splits at U+2028 inside a JSON string.
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _json_line(line, number)
        else:
            yield {self.field: path.read_text(encoding="utf-8")}

    def describe(self) -> str:
        return ", ".join(self.files)


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error}); one object a line") from error
