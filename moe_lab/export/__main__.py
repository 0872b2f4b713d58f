"""`python -m moe_lab.export`: a checkpoint or a plan in the words of a serving engine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lab.files import MODEL_CARD
from moe_lab.lookup import module_in, names_in
from moe_lab.types import UserError

OF_NO_TARGET = ("__main__", "folder", "gguf_converter", "given", "llama_cpp", "llama_process")


def _targets() -> dict[str, str]:
    """The targets by name, and the file of each in this folder."""
    return {name.replace("_", "-"): name for name in names_in(str(__package__), OF_NO_TARGET)}


def _arguments(given: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What was asked for, and of the options of targets those that were given."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.export",
        description="Write a checkpoint or a plan as what an engine reads, and check it.",
        epilog="What each target takes, and what reads it: docs/export.md",
    )
    parser.add_argument(
        "source", help="a checkpoint (folder, hub id, shipped:NAME), a run's folder, or plan.json"
    )
    parser.add_argument("--to", required=True, metavar="TARGET", help=", ".join(_targets()))
    parser.add_argument("--out", type=Path, help="default: in this folder, by the source's name")
    parser.add_argument("--overwrite", action="store_true", help="replace what lies there")
    parser.add_argument("--plan", metavar="FILE", help="the plan, where it is not found")
    parser.add_argument("--model", help="the dense model that the plan edits, where not found")
    group = parser.add_argument_group("options of targets", argument_default=argparse.SUPPRESS)
    group.add_argument("--outtype", help="gguf: f32 (default), f16, bf16, q8_0")
    group.add_argument(
        "--pre-tokenizer", metavar="NAME", help="gguf: where the converter does not know it"
    )
    group.add_argument(
        "--tolerance", type=float, help="gguf: largest difference of a logprob; default: 0.002"
    )
    group.add_argument("--bits", type=int, help="compressed-tensors: 2 to 8; default: 4")
    group.add_argument(
        "--group-size", metavar="N", help="compressed-tensors: 128 (default), 64, 32 or channel"
    )
    asked = vars(parser.parse_args(given))
    common = {"source", "to", "out", "overwrite", "plan", "model"}
    options = {key: asked.pop(key) for key in asked.keys() - common}
    return argparse.Namespace(**asked), options


def main(given: Sequence[str] | None = None) -> int:
    """The command; 2 for what cannot be exported."""
    asked, options = _arguments(given)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        for line in _export(asked, options):
            print(line)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _export(asked: argparse.Namespace, options: dict[str, Any]) -> list[str]:
    from moe_lab.export.given import find_given, written_whole

    there = _targets()
    if asked.to not in there:
        known = "; ".join(
            f"{name} ({module_in(str(__package__), file).TAKES})" for name, file in there.items()
        )
        raise UserError(f"--to {asked.to} does not exist; there are {known}")
    target = module_in(str(__package__), there[asked.to])
    for option in sorted(options.keys() - set(target.OPTIONS)):
        raise UserError(f"--{option.replace('_', '-')} is no option of --to {asked.to}")
    given = find_given(asked.source, asked.plan, asked.model)
    out = asked.out or Path(f"{given.name}{target.ENDING}")
    with written_whole(out, asked.overwrite) as partial:
        told: list[str] = target.export(given, partial, **options)
        if partial.is_dir():
            made = f"Made by `python -m moe_lab.export --to {asked.to}` from {given.name}"
            (partial / MODEL_CARD).write_text(f"# {out.name}\n\n{made}: {'; '.join(told)}.\n")
    return [*told, f"written: {out}"]


if __name__ == "__main__":
    sys.exit(main())
