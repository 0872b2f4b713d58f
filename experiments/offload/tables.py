"""Make the tables and pictures of this folder from the traces of its sweeps.

    python experiments/offload/tables.py outputs/offload

reads the reports of <folder>/<model>, at any depth, and replays the traces that they name.
`<model>/policies` has every policy on the intact model over sizes of the cache,
`<model>/compression` what each variant needs at the same memory, `<model>/routing.csv` what the
intact model's traces tell. Means and deviations are over the seeds that are there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from moe_lab.lookup import names_in
from moe_lab.offload.accesses import accesses_of
from moe_lab.offload.memory import BYTES_OF_GIB, Device
from moe_lab.offload.pictures import draw_policies
from moe_lab.offload.policies.hobbit import Hobbit
from moe_lab.offload.simulating import Question, simulate
from moe_lab.trace.file import read_trace
from moe_lab.trace.header import TraceHeader

HERE = Path(__file__).resolve().parent
BITS = 16  # of an expert's weights, but for the row of 4
TRANSFER = 1e-3  # seconds that an expert of the intact model takes over the link
SIZES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
MEMORY = (0.125, 0.25, 0.5)  # beside the rest of the model, the share of the intact one's experts
REPLAYED = ("lru", "lfu_sequence", "min")  # of which the table for people has the first
# Each row: the sweep's row, the variant of that run, and the bits of an expert's weights.
ROWS = {
    "intact": ("dense", "dense", BITS),
    "experts in 4 bits": ("dense", "dense", 4),
    "25 % of the experts pruned": ("prune_quarter", "compressed", BITS),
    "50 % of the experts pruned": ("prune_half", "compressed", BITS),
    "50 % of their hidden units pruned": ("narrow_half", "compressed", BITS),
    "50 % pruned, in 4 bits": ("prune_half", "compressed", 4),
    "one expert per token, untuned": ("top_1", "dense_top_1", BITS),
    "one expert per token, tuned": ("top_1", "finetuned", BITS),
}
FIGURES = ("decode/hit_rate", "decode/bytes_per_token", "decode/seconds_per_token",
           "prefill/seconds_per_token")  # fmt: skip


def reports(folder: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Of each job: the row of the sweep, the seed, the report."""
    for file in sorted(folder.rglob("report.json")):
        report = json.loads(file.read_text())
        row = report["job"].partition("row=")[2].partition(",")[0].split()[0]
        if report["status"] == "ok":
            yield row, int(report["seed"]), report


def machine(header: TraceHeader) -> Device:
    """A link over which an expert of the intact model takes TRANSFER."""
    return Device(bandwidth=header.layers[0].bytes_at(BITS) / TRANSFER)


def policies(found: list[tuple[str, int, dict[str, Any]]]) -> pd.DataFrame:
    """Every policy on the intact model's traces, over SIZES."""
    frames = []
    for row, seed, report in found:
        if row == "dense":
            accesses = accesses_of(read_trace(Path(report["dense/trace/file"])))
            slots = [round(share * len(accesses.layer_K)) for share in SIZES]
            names = names_in("moe_lab.offload.policies")
            asked = Question(names, machine(accesses.header), slots, bits=BITS)
            frames.append(simulate(accesses, asked).assign(seed=seed))
    return over_seeds(pd.concat(frames), ["policy", "share", "slots"])


def compression(found: list[tuple[str, int, dict[str, Any]]]) -> pd.DataFrame:
    """Every row with room for MEMORY of the intact model's experts beside the rest of its own.

    The rest is the same but for a head that is stored beside the embedding.
    """
    frames = []
    for title, (wanted, variant, bits) in ROWS.items():
        for row, seed, report in found:
            if row != wanted or f"{variant}/trace/file" not in report:
                continue
            intact = read_trace(Path(report["dense/trace/file"])).header
            accesses = accesses_of(read_trace(Path(report[f"{variant}/trace/file"])))
            for share in MEMORY:
                room = accesses.header.resident_bytes + share * intact.experts_bytes(BITS)
                gib = room / BYTES_OF_GIB
                asked = Question(REPLAYED, machine(intact), memory=[gib], bits=bits)
                told = simulate(accesses, asked).rename(columns={"share": "experts_that_fit"})
                kl = report.get(f"{variant}/kl") if bits == BITS else None
                frames.append(told.assign(variant=title, seed=seed, share=share, kl=kl))
    whole = pd.concat(frames)
    keys = ["variant", "share", "policy", "slots", "experts_that_fit"]
    return over_seeds(whole, keys, (*FIGURES, "kl"))


def routing(found: list[tuple[str, int, dict[str, Any]]]) -> pd.DataFrame:
    """What the intact model's traces tell: predictions, experts of a request, HOBBIT's precisions.

    high, low, skipped: of all choices of decoding, by the unimportance at HOBBIT's t1 and t2.
    """
    rows = []
    for row, seed, report in found:
        if row == "dense":
            told = {key.removeprefix("dense/trace/"): value for key, value in report.items()
                    if key.startswith("dense/trace/") and not key.endswith("file")}  # fmt: skip
            accesses = accesses_of(read_trace(Path(report["dense/trace/file"])))
            share = accesses.unimportance_A[accesses.decode_V[accesses.visit_A]]
            how = Hobbit()
            told["high"] = float((share <= how.t1).mean())
            told["low"] = float(((share > how.t1) & (share <= how.t2)).mean())
            told["skipped"] = float((share > how.t2).mean())
            rows.append({"seed": seed} | told)
    return pd.DataFrame(rows)


def over_seeds(
    frame: pd.DataFrame, keys: list[str], figures: tuple[str, ...] = FIGURES
) -> pd.DataFrame:
    """Means, standard deviations as <figure>_std, and how many seeds, in the order of the rows."""
    groups = frame.groupby(keys, sort=False)
    means, deviations = groups[list(figures)].mean(), groups[list(figures)].std()
    deviations.columns = [f"{name}_std" for name in deviations.columns]
    number = groups["seed"].nunique().rename("seeds")
    return pd.concat([means, deviations, number], axis=1).reset_index()


def markdown(frame: pd.DataFrame, names: list[str]) -> str:
    """A table for people: hits in percent, MB and ms for each token that is decoded."""
    shown = {
        "decode/hit_rate": ("hits", lambda value: f"{100 * value:.1f} %"),
        "decode/bytes_per_token": ("MB per token", lambda value: f"{value / 1e6:.3f}"),
        "decode/seconds_per_token": ("ms per token", lambda value: f"{1e3 * value:.2f}"),
        "kl": ("KL", lambda value: "–" if pd.isna(value) else f"{value:.4f}"),
    }
    kept = [name for name in (*names, *shown) if name in frame]
    lines = [[shown[name][0] if name in shown else name for name in kept]]
    lines.append(["---:" if name in shown else "---" for name in kept])
    for _, row in frame.iterrows():
        cells = []
        for name in kept:
            text = shown[name][1](row[name]) if name in shown else row[name]
            if name in ("share", "experts_that_fit"):
                text = f"{100 * row[name]:.1f} %"
            elif name != "kl" and name in shown and row["seeds"] > 1:
                text = f"{text} ± {shown[name][1](row[f'{name}_std'])}"
            cells.append(str(text))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main(folder: Path) -> None:
    for model in sorted(path for path in folder.iterdir() if any(path.rglob("report.json"))):
        found, home = list(reports(model)), HERE / model.name
        home.mkdir(exist_ok=True)
        routing(found).to_csv(home / "routing.csv", index=False, float_format="%.4g")
        by_policy, by_variant = policies(found), compression(found)
        for name, frame, keys in (
            ("policies", by_policy, ["policy", "share", "slots"]),
            ("compression", by_variant, ["variant", "share", "policy", "experts_that_fit"]),
        ):
            frame.to_csv(home / f"{name}.csv", index=False, float_format="%.6g")
            shown = frame[frame["policy"] == "lru"] if name == "compression" else frame
            (home / f"{name}.md").write_text(markdown(shown, keys))
        draw_policies(by_policy, home / "policies.png", f"{model.name}, intact")
        lru = by_variant[by_variant["policy"] == "lru"]
        title = f"{model.name}, LRU, at the same memory"
        across = "of the intact model's experts,"
        draw_policies(lru, home / "compression.png", title, line="variant", across=across)
        for picture in home.glob("*.pdf"):
            picture.unlink()
        print(home)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
