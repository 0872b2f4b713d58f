"""`python -m moe_lab.offload TRACE`: what a device would fetch and wait for, by policy and size."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_lab.lookup import names_in
from moe_lab.types import UserError

DEFAULT = "lru,lfu,lfu_sequence,min"
SHOWN_COLUMNS = {
    "policy": "policy", "slots": "experts", "decode/hit_rate": "hits",
    "decode/bytes_per_token": "MB per\ntoken", "decode/seconds_per_token": "ms per\ntoken",
    "prefill/hit_rate": "prefill\nhits", "prefill/bytes_per_token": "prefill\nMB per\ntoken",
    "prefill/seconds_per_token": "prefill\nms per\ntoken",
}  # fmt: skip


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",") if part]

    read.__name__ = f"list of {kind.__name__}"
    return read


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_lab.offload",
        description="Replay a trace (of a run with trace=full) on a device that not all experts "
        "fit on.",
        epilog="Example: python -m moe_lab.offload trace.parquet --experts 32,64,128 --policy "
        "lru,min,moe_infinity --policy hobbit:t1=0.5,low_share=0.3",
    )
    parser.add_argument("trace", type=Path, help="trace.parquet, or the folder that it lies in")
    parser.add_argument("--model", help="a checkpoint: refuse a trace of another")
    _add_sizes(parser)
    _add_machine(parser)
    parser.add_argument(
        "--policy", action="append", metavar="NAME,NAME | NAME:OPTION=VALUE,…",
        help=f"{', '.join(names_in('moe_lab.offload.policies'))}; may be repeated; default: "
        f"{DEFAULT}",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER",
        help="offload.csv, offload.json and offload.png into this folder",
    )  # fmt: skip
    return parser.parse_args(given)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument(
        "--experts",
        type=_listed(int),
        default=[],
        metavar="N,N",
        help="experts that the device has room for, of all layers together",
    )
    sizes.add_argument(
        "--memory",
        type=_listed(float),
        default=[],
        metavar="GIB,GIB",
        help="memory of the device; what is no routed expert is always on it",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(16, 8, 4, 3, 2),
        help="of an expert's weights, with scales; default: as traced",
    )
    parser.add_argument("--expert-bytes", type=int, metavar="BYTES", help="of one expert, as known")
    parser.add_argument(
        "--cache",
        choices=("global", "per-layer"),
        default="global",
        help="one for all layers, or for each its own; default: %(default)s",
    )
    parser.add_argument(
        "--access",
        choices=("atomic", "sequential"),
        help="a layer's experts together, or one by one; default: as traced",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=32.0,
        metavar="GB/S",
        help="of the link, 1e9 bytes a second; default: %(default)s",
    )
    parser.add_argument(
        "--layer-us",
        type=float,
        default=100.0,
        metavar="US",
        help="microseconds that one MoE layer computes; default: %(default)s",
    )
    parser.add_argument(
        "--token-us",
        type=float,
        default=1.0,
        metavar="US",
        help="more of them for each token of a pass; default: %(default)s",
    )


def main(given: Sequence[str] | None = None) -> int:
    """The command; 2 where what was asked for cannot be."""
    asked = _arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _check_numbers(asked)
        _do(asked)
    except BrokenPipeError:  # who reads has seen enough
        sys.stdout = None
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _check_numbers(asked: argparse.Namespace) -> None:
    for name, value, least in (
        ("--bandwidth", asked.bandwidth, 1e-9), ("--layer-us", asked.layer_us, 0.0),
        ("--token-us", asked.token_us, 0.0), ("--expert-bytes", asked.expert_bytes, 1),
        *(("--experts", one, 1) for one in asked.experts),
        *(("--memory", one, 1e-9) for one in asked.memory),
    ):  # fmt: skip
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"{name} {value:g}: it must be {'above 0' if least else '0 or more'}")
    if asked.bits and asked.expert_bytes:
        raise UserError("--bits and --expert-bytes both say how large an expert is: give one")


def _do(asked: argparse.Namespace) -> None:
    from moe_lab.offload.accesses import accesses_of
    from moe_lab.offload.simulating import simulate
    from moe_lab.trace.file import read_trace

    trace = read_trace(asked.trace)
    if asked.model:
        _check_model(asked.model, trace.header.model)
    frame = simulate(accesses_of(trace), _question(asked))
    _show(frame)
    if asked.output:
        _write(frame, trace.header.to_json(), asked)


def _question(asked: argparse.Namespace) -> Any:
    from moe_lab.offload.memory import Device
    from moe_lab.offload.simulating import Question

    policies = [
        name
        for given in asked.policy or [DEFAULT]
        for name in ([given] if ":" in given else given.split(","))
    ]
    machine = Device(asked.bandwidth * 1e9, asked.layer_us * 1e-6, asked.token_us * 1e-6)
    atomic = None if asked.access is None else asked.access == "atomic"
    return Question(policies, machine, asked.experts, asked.memory, asked.bits,
                    asked.expert_bytes, asked.cache == "per-layer", atomic)  # fmt: skip


def _check_model(asked: str, traced: str) -> None:
    from moe_lab.models.checkpoint import resolve

    found = resolve(asked).fingerprint
    if found != traced:
        raise UserError(
            f"--model {asked} is {found}, and the trace is of {traced}: a trace of another model "
            "says nothing of this one; record one of it (trace=full), or leave out --model"
        )


def _show(frame: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from moe_lab.console import terminal

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # 80 columns hold it
    for name in SHOWN_COLUMNS.values():
        first = name == "policy"
        table.add_column(
            name, justify="left" if first else "right", no_wrap=not first, overflow="fold"
        )
    for _, row in frame.iterrows():
        table.add_row(*(_written(key, row[key]) for key in SHOWN_COLUMNS))
    terminal().print(table)


def _written(key: str, value: Any) -> str:
    if key.endswith("hit_rate"):
        return f"{100 * value:.1f} %"
    if "bytes" in key:
        return f"{value / 1e6:.4g}"
    return f"{1e3 * value:.4g}" if "seconds" in key else str(value)


def _write(frame: Any, header: dict[str, Any], asked: argparse.Namespace) -> None:
    from moe_lab.integrity import write_whole
    from moe_lab.offload.pictures import draw_policies

    folder: Path = asked.output
    folder.mkdir(parents=True, exist_ok=True)
    given = {key: str(value) if isinstance(value, Path) else value
             for key, value in vars(asked).items()}  # fmt: skip
    told = {"asked": given, "trace": header, "rows": json.loads(frame.to_json(orient="records"))}
    write_whole(folder / "offload.csv", frame.to_csv(index=False))
    write_whole(folder / "offload.json", json.dumps(told, indent=1) + "\n")
    draw_policies(frame, folder / "offload.png", f"Decoding, offloaded: {header['family']}")
    print(f"offload.csv, offload.json and offload.png are in {folder}")


if __name__ == "__main__":
    raise SystemExit(main())
