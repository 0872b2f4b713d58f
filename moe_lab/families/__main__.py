"""`python -m moe_lab.families`: what works for each MoE model type that transformers has."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.families",
        description="Check moe_lab on a tiny random model of every MoE model type that the "
        "installed transformers has, and print what works. Ends with 1 where anything is at fault.",
    )
    parser.add_argument("types", nargs="*", help="model types, such as qwen3_moe; default: all")
    parser.add_argument(
        "--write",
        nargs="+",
        type=Path,
        default=[],
        metavar="PAGE",
        help="pages whose marked places get the table or the counts (all types only)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there")
    parser.add_argument(
        "--processes", type=int, default=max(1, min(4, os.cpu_count() or 1)),
        help="types at a time; default: %(default)s",
    )  # fmt: skip
    asked = parser.parse_args(given)
    if asked.types and asked.write:
        parser.error("--write needs all types: name none")
    if asked.processes < 1:
        parser.error(f"--processes={asked.processes}: at least 1")
    return asked


def main(given: Sequence[str] | None = None) -> int:
    """Run the checks and show them; 1 where anything is at fault, 2 for a type that is none."""
    asked = _arguments(given)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MKL_CBWR", "AVX2")  # every process rounds alike
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from moe_lab.console import terminal
    from moe_lab.families.all_types import check_types
    from moe_lab.families.table import counts, sentences, terminal_table, with_table
    from moe_lab.families.tiny import model_types
    from moe_lab.progress import progress

    console, known = terminal(), model_types()
    for name in asked.types:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or ", ".join(known)
            console.print(f"{name!r} is no model type with experts here; there is {near}")
            return 2
    names = asked.types or list(known)
    rows = list(progress(check_types(names, asked.processes), "families", len(names)))
    console.print(terminal_table(rows))
    console.print("\n\n".join([counts(rows), *sentences(rows)]), soft_wrap=True)
    if asked.json:
        asked.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    for page in asked.write:
        page.write_text(with_table(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
