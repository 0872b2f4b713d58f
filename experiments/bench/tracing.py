"""What tracing costs beside generating: both in one process, turn by turn, on a shipped model.

    python experiments/bench/tracing.py [model] [requests] [new tokens]

The trace is the whole of it: watching the routers, predictions for two layers ahead, and the
Parquet file, read back. Times are of the processor, since a busy machine would decide others; the
first round, in which libraries are loaded, does not count.
Claim: tracing takes at most 1.1 times what generating alone takes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from moe_lab.data.embedded import StandardLibrary
from moe_lab.models.checkpoint import SHIPPED, Model, resolve
from moe_lab.models.layers import moe_layers
from moe_lab.trace.file import join_parts, write_part
from moe_lab.trace.header import TraceHeader
from moe_lab.trace.recorder import Recorder, traced_layer
from moe_lab.trace.recording import continue_greedily, table_of

LIMIT, ROUNDS, PROMPT = 1.1, 6, 64


def header_of(model: Model, requests: int, new_tokens: int) -> TraceHeader:
    layers = tuple(map(traced_layer, moe_layers(model)))
    return TraceHeader(
        model="bench", family=model.config.model_type, dtype="float32", layers=layers,
        resident_bytes=0, tokenizer="", data="", seed=0, requests=requests, new_tokens=new_tokens,
        lookahead=2, batch_size=1, access="atomic",
    )  # fmt: skip


def main(name: str, requests: int, new_tokens: int) -> None:
    checkpoint = resolve(f"{SHIPPED}{name}")
    model = checkpoint.load()
    prompts = StandardLibrary(requests, PROMPT).tokens(checkpoint.tokenizer()).samples
    header = header_of(model, requests, new_tokens)
    recorder = Recorder(model, header.lookahead)
    plain, watched = [], []
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        for turn in range(ROUNDS):
            parts, generating, tracing = [], 0.0, 0.0
            for number, prompt in enumerate(prompts):
                ids = torch.tensor([prompt])
                for traced in (False, True) if (turn + number) % 2 else (True, False):
                    started = time.process_time()
                    if traced:
                        with recorder.open():
                            continue_greedily(model, ids, new_tokens)
                        passes, records = recorder.take()
                        table = table_of(passes, records, [number], len(prompt), 0, header)
                        parts.append(folder / f"{number}.parquet")
                        write_part(table, parts[-1])
                        tracing += time.process_time() - started
                    else:
                        continue_greedily(model, ids, new_tokens)
                        generating += time.process_time() - started
            started = time.process_time()
            join_parts(parts, folder / "trace.parquet", header)
            watched.append(tracing + time.process_time() - started)
            plain.append(generating)
    ratio = statistics.median(b / a for a, b in zip(plain[1:], watched[1:], strict=True))
    times = f"{statistics.median(plain[1:]):.2f} s, traced {statistics.median(watched[1:]):.2f} s"
    told = f"generating {requests} x {new_tokens} tokens {times}"
    print(f"{name}: {told}: {ratio:.3f} times (at most {LIMIT})")
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    given = sys.argv[1:]
    model, *numbers = given or ["tiny_deepseek"]
    main(model, *(list(map(int, numbers)) + [8, 32][len(numbers) :]))
