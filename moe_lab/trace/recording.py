"""A model continues prompts, and what its routers do becomes a trace: part by part, then one file.

Each group of requests that are generated together is a part, written whole before the next begins;
a recording that was killed goes on behind its last part. Generating is greedy and each group by
itself, so that it gives the same file as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from moe_lab.data.tokens import chunks
from moe_lab.files import TRACE
from moe_lab.models.checkpoint import Model
from moe_lab.progress import progress
from moe_lab.trace.file import (
    AHEAD_COLUMN,
    DECODE,
    PREFILL,
    join_parts,
    lists_of,
    schema_of,
    write_part,
)
from moe_lab.trace.header import TraceHeader
from moe_lab.trace.recorder import LayerRecord, Recorder
from moe_lab.types import UserError

Prompts = Sequence[tuple[int, ...]]
PART_FILE = "part-{:06d}.parquet"


def generated_together(prompts: Prompts, size: int) -> list[list[int]]:
    """The numbers of prompts that are generated together: of one length, so that none is padded."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    groups = [group for numbers in by_length.values() for group in chunks(numbers, size)]
    return sorted(groups)


def record(model: Model, prompts: Prompts, header: TraceHeader, folder: Path) -> None:
    """Write the trace of a model that continues these prompts, as `header` says.

    Goes on behind the parts that lie in the folder, which belong to the same request. Raises
    UserError where the family cannot generate.
    """
    recorder = Recorder(model, header.lookahead)
    groups = generated_together(prompts, header.batch_size)
    parts = [folder / PART_FILE.format(number) for number in range(len(groups))]
    steps = header.new_tokens
    with recorder.open():
        for number in progress(range(len(groups)), "trace"):
            if not _is_whole(parts[number]):
                together = groups[number]
                ids_BL = torch.tensor([prompts[one] for one in together])
                continue_greedily(model, ids_BL, steps)
                table = table_of(
                    *recorder.take(), together, ids_BL.shape[1], number * steps, header
                )
                write_part(table, parts[number])
    join_parts(parts, folder / TRACE, header)
    for part in parts:
        part.unlink()


def _is_whole(part: Path) -> bool:
    """Whether a part was written and can be read."""
    try:
        return part.is_file() and pq.ParquetFile(part).metadata is not None
    except (pa.ArrowInvalid, OSError):
        return False


@torch.inference_mode()
def continue_greedily(model: Model, ids_BL: Tensor, number: int) -> Tensor:
    """The ids, and so many tokens behind them, each the likeliest; none ends before."""
    ids_BL = ids_BL.to(model.device)
    try:
        return cast("Callable[..., Tensor]", model.generate)(
            ids_BL, attention_mask=torch.ones_like(ids_BL), do_sample=False, num_beams=1,
            temperature=None, top_k=None, top_p=None, repetition_penalty=1.0, eos_token_id=None,
            pad_token_id=int(ids_BL[0, 0]), max_new_tokens=number, min_new_tokens=None,
        )  # fmt: skip
    except Exception as error:  # a family's own way of not generating
        raise UserError(
            f"trace=full: {type(model).__name__} does not generate "
            f"({' '.join(str(error).split())[:200]}): leave it out (trace=none)"
        ) from error


def table_of(
    passes: Sequence[int],
    records: Sequence[LayerRecord],
    requests: Sequence[int],
    prompt_length: int,
    first_pass: int,
    header: TraceHeader,
) -> pa.Table:
    """The rows of some requests that were generated together, in the order of execution.

    passes: the tokens of each forward pass, of all requests together; first_pass: its number in
    the trace.
    """
    size = len(requests)
    pass_T = np.repeat(np.arange(len(passes)), passes)
    within_T = np.concatenate([np.arange(number) for number in passes])
    tokens_T = np.repeat(np.asarray(passes) // size, passes)
    first = np.array([0, *np.cumsum(np.asarray(passes) // size)[:-1]])
    if passes[0] != size * prompt_length:
        raise UserError(
            f"the first forward pass has {passes[0]} tokens and not the {size * prompt_length} of "
            "the prompts: a family that reads a prompt in parts cannot be traced"
        )
    layers, order = header.layers, np.argsort(np.tile(pass_T, len(records)), kind="stable")
    numbers = {
        "request": np.asarray(requests)[within_T // tokens_T],
        "pass": first_pass + pass_T,
        "step": pass_T,
        "tokens": tokens_T,
        "position": first[pass_T] + within_T % tokens_T,
    }
    columns = {name: np.tile(values, len(records))[order] for name, values in numbers.items()}
    columns["layer"] = np.repeat([layer.index for layer in layers], len(pass_T))[order]
    lists: dict[str, list[Tensor | None]] = {
        "experts": [record.experts_TK for record in records],
        "scores": [record.score_TK for record in records],
        "weights": [record.weight_TK for record in records],
    }
    for one in range(header.lookahead):
        lists[AHEAD_COLUMN.format(one + 1)] = [
            record.ahead[one] if one < len(record.ahead) else None for record in records
        ]
    schema = schema_of(header)
    made = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
    made["phase"] = _phases(columns["step"])
    for name, tensors in lists.items():
        made[name] = _ordered(tensors, len(pass_T), order, schema.field(name).type.value_type)
    return pa.Table.from_arrays([made[name] for name in schema.names], schema=schema)


def _phases(step_R: np.ndarray) -> pa.Array:
    places = pa.array((step_R > 0).astype(np.int8))
    return pa.DictionaryArray.from_arrays(places, pa.array([PREFILL, DECODE]))


def _ordered(
    tensors: Sequence[Tensor | None], tokens: int, order: np.ndarray, kind: pa.DataType
) -> pa.Array:
    """The lists of all layers, one layer behind another, in another order of their rows."""
    widths = [0 if one is None else one.shape[1] for one in tensors]
    values = np.zeros((len(tensors), tokens, max(widths)), np.float32)
    for place, tensor in enumerate(tensors):
        if tensor is not None:
            values[place, :, : widths[place]] = tensor.cpu().numpy()
    width_R = np.repeat(widths, tokens)[order]
    values_RK = values.reshape(-1, max(widths))[order]
    nulls = np.repeat([one is None for one in tensors], tokens)[order]
    return lists_of(values_RK, width_R, nulls, kind)
