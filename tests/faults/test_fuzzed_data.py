"""Any file of text is read or refused in words."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from damages import VALUES, damaged_bytes
from fuzzed import Effort, Tally, Told, fuzz, told
from hypothesis import strategies as st
from running import QUICK

WORDS = st.sampled_from(["A router sends tokens.", "", " ", "\x00", "é😀\u2028", '"', "a,b", "{}"])
CELLS = WORDS | st.sampled_from(VALUES)
TURNS = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "system", 3, None]),
                  "content": CELLS | st.lists(CELLS, max_size=2)}
)  # fmt: skip
ROWS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"text": WORDS | CELLS, "messages": st.lists(TURNS, max_size=3) | CELLS,
                      "other": CELLS}
    ) | CELLS | WORDS, max_size=6,
)  # fmt: skip
KINDS = ("jsonl", "json", "csv", "txt", "parquet", "jsonl.gz", "csv.gz", "txt.gz", "jsonl.zst")
FIELDS = ("text", "messages", "other", "absent")
DAMAGE = st.none() | st.tuples(st.integers(0, 2**20), st.integers(0, 2**10))


def _content(kind: str, rows: list[Any]) -> bytes:
    """The rows as a file of that kind, as nearly as it can hold them."""
    lines = [json.dumps(row) for row in rows]
    if kind.startswith("jsonl"):
        content = "".join(line + "\n" for line in lines).encode()
    elif kind == "json":
        content = f"[{','.join(lines)}]".encode()
    elif kind.startswith("csv"):
        content = "\n".join(["text,other", *lines]).encode()
    elif kind == "parquet":
        content = _parquet(rows)
    else:
        content = "\n".join(lines).encode()
    return gzip.compress(content, mtime=0) if kind.endswith(".gz") else content


def _parquet(rows: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    held = [row if isinstance(row, dict) else {"text": str(row)} for row in rows]
    texts = [None if row.get("text") is None else ascii(row["text"]) for row in held]
    table = pyarrow.table({"text": texts, "other": list(range(len(held)))})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


@pytest.fixture
def base(small: list[str]) -> list[str]:
    kept = [one for one in small if not one.startswith("calibration.")]
    return [*kept, *QUICK, "calibration.num_samples=1", "calibration.max_length=16"]


def test_any_file(
    base: list[str], fuzz_folder: Path, elsewhere: None, effort: Effort, tally: Tally
) -> None:
    def check(case: tuple[str, str, list[Any], tuple[int, int] | None]) -> Told:
        kind, field, rows, damage = case
        content = _content(kind, rows)
        path = fuzz_folder / f"data.{kind}"
        path.write_bytes(damaged_bytes(content, *damage) if damage else content)
        overrides = [f"calibration.files=[{path}]", f"calibration.field={field}"]
        return told([*base, f"store={fuzz_folder}/store", *overrides], fuzz_folder / "run")

    cases = st.tuples(st.sampled_from(KINDS), st.sampled_from(FIELDS), ROWS, DAMAGE)
    fuzz(cases, check, effort, tally)
    tally.check()
