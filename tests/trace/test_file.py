"""A trace file: read back as written, and whatever is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import tiny_model
from traced import traced

from moe_lab.trace.file import Lists, Trace, join_parts, read_trace, write_part
from moe_lab.trace.header import HEADER_KEY
from moe_lab.types import UserError


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return traced(tiny_model("qwen2_moe"), tmp_path_factory.mktemp("trace"))


def test_lists_of_several_lengths() -> None:
    column = pa.chunked_array([pa.array([[1, 2], None]), pa.array([[], [3]])])
    lists = Lists.of(column)
    assert lists.starts.tolist() == [0, 2, 2, 2, 3] and lists.values.tolist() == [1, 2, 3]
    assert lists.rows.tolist() == [0, 0, 3]
    assert lists.padded(-1).tolist() == [[1, 2], [-1, -1], [-1, -1], [3, -1]]


def test_rows_stand_in_the_order_of_execution(trace: Trace) -> None:
    names = ("pass", "layer", "position")
    places = list(zip(*(trace.numbers(name).tolist() for name in names), strict=True))
    assert places == sorted(places) and len(set(places)) == len(trace)
    assert sorted(set(trace.numbers("layer").tolist())) == [1, 2, 3], "layer 0 has no experts"
    assert trace.layer_place.tolist() == (trace.numbers("layer") - 1).tolist()
    assert (trace.decode == (trace.numbers("step") > 0)).all()
    rows = trace.by_layer()
    assert [len(one) for one in rows] == [len(trace) // 3] * 3
    assert all((trace.numbers("pass")[rows[0]] == trace.numbers("pass")[one]).all() for one in rows)
    assert pq.ParquetFile(trace.path).num_row_groups == 3, "one for each request"


def test_what_is_written_is_read_back(trace: Trace, tmp_path: Path) -> None:
    part = tmp_path / "part.parquet"
    write_part(trace.table, part)
    join_parts([part], tmp_path / "trace.parquet", trace.header)
    again = read_trace(tmp_path)
    assert again.table.equals(trace.table) and again.header == trace.header


def test_a_trace_that_reads_as_something_else_is_noticed(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "part.parquet"
    write_part(trace.table, part)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, number: trace.table.slice(1))
    with pytest.raises(RuntimeError, match="reads as something else"):
        join_parts([part], tmp_path / "trace.parquet", trace.header)
    assert not (tmp_path / "trace.parquet").exists()


def test_whatever_is_no_trace_is_refused(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no trace at .*trace=full"):
        read_trace(tmp_path)
    file = tmp_path / "some.parquet"
    file.write_text("text")
    with pytest.raises(UserError, match="is no trace: it cannot be read as Parquet"):
        read_trace(file)
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(UserError, match="no trace of moe_lab's"):
        read_trace(file)
    whole = trace.path.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_trace(file)
    pq.write_table(trace.table.drop_columns(["weights"]), file)
    with pytest.raises(UserError, match="lacks the columns weights"):
        read_trace(file)
    told = trace.table.schema.metadata[HEADER_KEY].replace(b'"version": 1', b'"version": 9')
    pq.write_table(trace.table.replace_schema_metadata({HEADER_KEY: told}), file)
    with pytest.raises(UserError, match="a trace of format 9, and this version reads format 1"):
        read_trace(file)


def test_experts_beyond_the_header_are_refused(trace: Trace, tmp_path: Path) -> None:
    for before, after in ((b'"experts": 8', b'"experts": 5'), (b'"index": 3', b'"index": 4')):
        told = trace.table.schema.metadata[HEADER_KEY].replace(before, after)
        pq.write_table(
            trace.table.replace_schema_metadata({HEADER_KEY: told}), tmp_path / "trace.parquet"
        )
        with pytest.raises(UserError, match="that its header does not know"):
            read_trace(tmp_path)
    assert np.unique(trace.numbers("layer")).tolist() == [1, 2, 3]
