"""A trace on disk: one Parquet file, a row for each token at each MoE layer of each forward pass.

Rows stand in the order of execution: pass by pass, in it layer by layer, in it token by token.
Gates and predictions are lists, so that layers may differ in how many experts a token gets.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_lab.files import TRACE
from moe_lab.integrity import PARTIAL, put_in_place
from moe_lab.trace.header import HEADER_KEY, TraceHeader
from moe_lab.types import UserError

PREFILL, DECODE = "prefill", "decode"
AHEAD_COLUMN = "ahead_{}"  # the column of what is predicted for the so-manieth MoE layer behind
TRACE_COLUMNS = {
    "request": pa.int32(),  # number of the request
    "pass": pa.int32(),  # number of the forward pass in the whole trace
    "step": pa.int32(),  # of the pass in its request: 0 is the prefill
    "phase": pa.dictionary(pa.int8(), pa.string()),
    "tokens": pa.int32(),  # of this request in this pass
    "position": pa.int32(),  # of the token in its request
    "layer": pa.int32(),  # the decoder layer's true index
    "experts": pa.list_(pa.int16()),  # the heaviest first
    "scores": pa.list_(pa.float32()),  # of each before the chosen share them among themselves
    "weights": pa.list_(pa.float32()),  # of each as the router hands it on
}


def schema_of(header: TraceHeader) -> pa.Schema:
    """The columns of a trace, and its header in the metadata."""
    ahead = {AHEAD_COLUMN.format(one + 1): pa.list_(pa.int16()) for one in range(header.lookahead)}
    told = json.dumps(header.to_json(), sort_keys=True).encode()
    return pa.schema(list((TRACE_COLUMNS | ahead).items()), metadata={HEADER_KEY: told})


def write_part(table: pa.Table, path: Path) -> None:
    """A table as a file of its own, which is there whole or not at all."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    pq.write_table(table, partial)
    put_in_place(partial, path)


def join_parts(parts: Sequence[Path], path: Path, header: TraceHeader) -> None:
    """One trace of its parts, one row group after another, read back and compared with them.

    In memory is one part. RuntimeError where what was written is not what the parts hold.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with pq.ParquetWriter(partial, schema_of(header)) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part), row_group_size=2**62)
    written = pq.ParquetFile(partial)
    if written.num_row_groups != len(parts) or any(
        not written.read_row_group(number).equals(pq.read_table(part))
        for number, part in enumerate(parts)
    ):
        raise RuntimeError(f"{path} was written, and reads as something else")
    put_in_place(partial, path)


@dataclass(frozen=True)
class Lists:
    """A list for each row: of row r the values from starts[r] to starts[r + 1]."""

    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Lists:
        """Of a column of lists; a null is a list of none."""
        lengths = np.concatenate(
            [
                np.zeros(1, np.int64),
                *(chunk.value_lengths().fill_null(0) for chunk in column.chunks),
            ]
        )
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        return cls(np.cumsum(lengths), np.concatenate(values or [np.zeros(0, np.int64)]))

    @property
    def rows(self) -> np.ndarray:
        """The row of each value."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def padded(self, fill: float) -> np.ndarray:
        """The lists as a table [rows, longest], filled up behind shorter ones."""
        lengths = np.diff(self.starts)
        there = np.arange(lengths.max(initial=0)) < lengths[:, None]
        made = np.full(there.shape, fill, self.values.dtype)
        made[there] = self.values
        return made


@dataclass(frozen=True)
class Trace:
    """A trace, read: its header, and a table with a row for each token at each layer of a pass."""

    header: TraceHeader
    table: pa.Table
    path: Path

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [rows]."""
        found: np.ndarray = self.table[name].to_numpy()
        return found

    def lists(self, name: str) -> Lists:
        """A column of lists."""
        return Lists.of(self.table[name])

    @functools.cached_property
    def decode(self) -> np.ndarray:
        """Whether a row is of decoding, [rows]."""
        return self.numbers("step") > 0

    def by_layer(self) -> list[np.ndarray]:
        """The rows of each MoE layer; those of one token stand at the same place in all of them."""
        return [np.flatnonzero(self.layer_place == one) for one in range(len(self.header.layers))]

    @functools.cached_property
    def layer_place(self) -> np.ndarray:
        """Which MoE layer in the order of execution a row is of, [rows]."""
        indices = np.array([layer.index for layer in self.header.layers])
        order = np.argsort(indices)
        found: np.ndarray = order[np.searchsorted(indices[order], self.numbers("layer"))]
        return found


def read_trace(path: Path) -> Trace:
    """A trace, from its file or the folder that it lies in; UserError for whatever is none."""
    file = path / TRACE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"there is no trace at {path}: a run with trace=full tells in its report where its "
            "traces lie (<variant>/trace/file)"
        )
    opened = _opened(file)
    told = (opened.schema_arrow.metadata or {}).get(HEADER_KEY)
    if told is None:
        raise UserError(f"{file} is a Parquet file, and no trace of moe_lab's: it has no header")
    try:
        header = TraceHeader.from_json(json.loads(told))
    except (UserError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    if missing := [
        name for name in schema_of(header).names if name not in opened.schema_arrow.names
    ]:
        raise UserError(f"{file} lacks the columns {', '.join(missing)} of a trace")
    trace = Trace(header, opened.read(), file)
    _check_layers(trace)
    return trace


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{file} is no trace: it cannot be read as Parquet ({told})") from error


def _check_layers(trace: Trace) -> None:
    """Refuse rows of layers or experts that the header does not know."""
    known = {layer.index for layer in trace.header.layers}
    if not len(trace) or not set(np.unique(trace.numbers("layer"))) <= known:
        raise UserError(f"{trace.path} has rows of layers that its header does not know, or none")
    experts = trace.lists("experts")
    most = np.array([layer.experts for layer in trace.header.layers])[trace.layer_place]
    if bool((experts.values >= most[experts.rows]).any()):
        raise UserError(f"{trace.path} has experts that its header does not know")


def lists_of(
    values_RK: np.ndarray, width_R: np.ndarray, null_R: np.ndarray, kind: pa.DataType
) -> pa.Array:
    """A column of lists: of each row its first values, so many of them, or a null."""
    there = np.arange(values_RK.shape[1]) < width_R[:, None]
    starts = np.zeros(len(width_R) + 1, np.int32)
    np.cumsum(width_R, out=starts[1:])
    values = pa.array(values_RK[there].astype(kind.to_pandas_dtype()))
    return pa.ListArray.from_arrays(starts, values, mask=pa.array(null_R))
