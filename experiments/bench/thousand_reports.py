"""A thousand reports: reading them, the table in all formats with two baselines, and the page.

    python experiments/bench/thousand_reports.py [number]

Claims: the table takes less than 5 seconds; a browser (where there is a Chromium) opens the page
in less than 2, and sorts it in less than 2, each to the second frame after it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from moe_lab.report.frame import read_reports
from moe_lab.report.page.page import write_page
from moe_lab.report.report import write_report
from moe_lab.tables.outputs import make_table
from moe_lab.tables.pivot import Request

NUM_TASKS = 60  # as many as MMLU has subjects
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
OPENED = f"async () => {{ await {DRAWN}; return performance.now(); }}"
SORTED = f"""async () => {{
    const started = performance.now();
    document.querySelector('th[data-key="compressed/kl"] button').click();
    await {DRAWN};
    return performance.now() - started;
}}"""


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
    write_report(folder / str(number), one | {"sweep": "bench", "job": f"job {number}"})


def look(file: Path) -> str:
    """Seconds that a browser takes to open the page and to sort it twice."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        return "no Chromium to open it with"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        shown = browser.new_page()
        shown.goto(file.as_uri())
        opening = shown.evaluate(OPENED)
        sorting = [shown.evaluate(SORTED) for _ in range(2)]
        browser.close()
    times = ", ".join(f"{one / 1000:.2f} s" for one in sorting)
    return f"opened in {opening / 1000:.2f} s, sorted in {times} (each less than 2 s)"


def main(number: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in range(number):
            write(folder, one)
        started = time.perf_counter()
        frame = read_reports(folder)
        read = time.perf_counter()
        made = make_table(frame, Request(baseline=["dense", "metric=metric_0"]))
        texts = made.markdown(), made.csv(), made.latex()
        pivoted = time.perf_counter()
        file = write_page(folder)
        done = time.perf_counter()
        rows = len(made.index)
        print(f"{number} reports of {frame.shape[1]} keys, {rows} rows, {len(texts)} formats")
        print(f"read {read - started:.2f} s, table {pivoted - read:.2f} s (together less than 5 s)")
        print(f"page {done - pivoted:.2f} s, {file.stat().st_size / 1e6:.1f} MB; {look(file)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
