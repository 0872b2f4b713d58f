"""A thousand reports: reading them, the table in all formats, with two baselines; the page.

    python experiments/bench/thousand_reports.py [number]

Claims: the table takes less than 5 seconds. Prints seconds of each part, on one thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from moe_lab import page, report, reports, tables
from moe_lab.pivot import Request

NUM_TASKS = 60  # as many as MMLU has subjects


def write(folder: Path, number: int) -> None:
    """A report of a sweep over 25 criteria, 8 ratios and 5 seeds, with made-up figures."""
    seed, ratio, metric = number // 200, number // 25 % 8 / 10, number % 25
    one = {"status": "ok", "error": None, "model": "made_up", "method": "prune"}
    one |= {"metric": f"metric_{metric}", "ratio": ratio, "seed": seed, "commit": "none"}
    for variant in ("dense", "compressed"):
        loss = 0.0 if variant == "dense" else ratio * (1 + metric / 25) / 4
        scores = [max(0.0, 0.9 - loss + (number * task % 97) / 970) for task in range(NUM_TASKS)]
        one |= {f"{variant}/eval/task_{task}/acc": score for task, score in enumerate(scores)}
        one |= {f"{variant}/eval/average": sum(scores) / NUM_TASKS, f"{variant}/kl": loss}
        one |= {f"{variant}/parameter_ratio": 1 - loss, f"{variant}/prefill_speedup": 1 + loss}
    (folder / str(number)).mkdir()
    report.write(folder / str(number), one | {"sweep": "bench", "job": f"job {number}"})


def main(number: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in range(number):
            write(folder, one)
        started = time.perf_counter()
        frame = reports.read(folder)
        read = time.perf_counter()
        request = Request(baseline=["dense", "metric=metric_0"])
        made = tables.make(frame, request)
        texts = made.markdown(), made.csv(), made.latex()
        pivoted = time.perf_counter()
        written = page.write(folder)
        done = time.perf_counter()
        size = written.stat().st_size / 1e6
    rows = len(made.index)
    print(f"{number} reports of {frame.shape[1]} keys, {rows} rows, {len(texts)} formats")
    print(f"read {read - started:.2f} s, table {pivoted - read:.2f} s (together less than 5 s)")
    print(f"page {done - pivoted:.2f} s, {size:.1f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
