"""`python -m moe_lab.serving`: what serving engines make of the checkpoints that moe_lab writes."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_lab.console import terminal
from moe_lab.report.serving import ENGINES, MATRIX, Matrix
from moe_lab.types import UserError

STORE = Path("outputs/store")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.serving",
        description="Make checkpoints by every method, of the shipped models and of tiny random "
        "ones of eight families, serve each by every engine, and print whether the engine computes "
        "what transformers does, refuses it, or is silently wrong. Ends with 1 where anything is "
        "silently wrong. What was found before is remembered in the store.",
    )
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE",
        help=f"of {', '.join(ENGINES)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD",
        help="checkpoints with all these words in their names, and their dense ones",
    )  # fmt: skip
    parser.add_argument(
        "--vllm", default=".venv-vllm/bin/python", metavar="PYTHON",
        help="the Python of vLLM's environment (make serving makes it); default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--write", nargs="+", type=Path, default=[], metavar="PAGE",
        help="pages whose marked place gets the matrix, which is also shipped with the package "
        "(all checkpoints only; engines that are not asked stay as they are)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=max(1, min(2, os.cpu_count() or 1)),
        help="engines at a time; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--store", type=Path, default=STORE, help="default: %(default)s")
    asked = parser.parse_args(given)
    if asked.processes < 1:
        parser.error(f"--processes={asked.processes}: at least 1")
    if asked.only and asked.write:
        parser.error("--write needs all checkpoints: leave --only out")
    return asked


def main(given: Sequence[str] | None = None) -> int:
    """Ask the engines and show what came of it; 1 where anything is silently wrong, 2: refused."""
    asked = _arguments(given)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MKL_CBWR", "AVX2")  # every process rounds alike
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    console = terminal()
    try:
        found = _found(asked)
    except UserError as error:
        console.print(str(error), soft_wrap=True)
        return 2
    from moe_lab.serving.table import reasons, serving_table, verdict_counts, with_matrix

    console.print(serving_table(found))
    parts = [verdict_counts(found), *reasons(found.cells)]
    console.print("\n\n".join(parts), soft_wrap=True)
    if asked.write:
        before = Matrix.read(MATRIX) if MATRIX.is_file() else Matrix({}, ())
        found = before.with_cells(found.cells, found.versions)
        MATRIX.write_text(found.to_text(), encoding="utf-8")
    for page in asked.write:
        page.write_text(with_matrix(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    return int(any(cell.verdict == "silent" for cell in found.cells))


def _found(asked: argparse.Namespace) -> Matrix:
    from moe_lab.serving.asking import cells_of, chosen, made
    from moe_lab.serving.engines import engines
    from moe_lab.store import Store

    wanted = chosen(asked.only)
    if not wanted:
        raise UserError(f"--only {' '.join(asked.only)}: no checkpoint has all these words")
    every = engines(asked.vllm)
    some = [every[name] for name in ENGINES if name in asked.engines]
    versions = {engine.name: engine.versions() for engine in some}  # refused before any work
    store = Store(asked.store.absolute())  # engines start elsewhere
    checkpoints = made(store, wanted)
    with ThreadPoolExecutor(asked.processes) as pool:  # each waits for a process
        found = list(pool.map(lambda engine: cells_of(store, engine, checkpoints), some))
    return Matrix(versions, tuple(itertools.chain.from_iterable(found)))


if __name__ == "__main__":
    raise SystemExit(main())
