"""What each expert is worth alone, and how well each criterion guesses it.

    python experiments/seer_moe/single_experts.py [--model tiny_mixtral] [--output FOLDER]

Leaves out one expert of one layer at a time (exactly as pruning it would) and measures how much the
held-out loss rises, in nats per token. Then, layer by layer, Spearman's rank correlation between
that and each criterion's score on the calibration text; and how unequal the counts are at all.
Counting can only find the experts that matter if those are the ones that are chosen often.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import pandas as pd
import torch

from moe_lab import checkpoint
from moe_lab.data import StandardLibrary
from moe_lab.finetune import next_token_loss
from moe_lab.metrics.frequency import frequency
from moe_lab.metrics.random import random
from moe_lab.metrics.reap import reap
from moe_lab.metrics.router_norm import router_norm
from moe_lab.metrics.soft_count import soft_count
from moe_lab.moe import moe_layers
from moe_lab.progress import progress
from moe_lab.routing import restricted
from moe_lab.statistics import collect
from moe_lab.tokens import Tokens

METRICS = {
    "frequency": frequency,
    "soft_count": soft_count,
    "reap": reap,
    "router_norm": router_norm,
    "random": functools.partial(random, seed=0),
}
BATCH_SIZE = 32


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, tokens: Tokens) -> float:
    """Nats per token."""
    total = 0.0
    for start in range(0, len(tokens.samples), BATCH_SIZE):
        part = tokens.take(range(start, min(start + BATCH_SIZE, len(tokens.samples))))
        total += next_token_loss(model, part.labelled()).item()
    return total / tokens.num_targets


def measure(name: str) -> pd.DataFrame:
    """A row for each expert: the rise of the loss without it, and every criterion's score."""
    shipped = checkpoint.resolve(f"shipped:{name}", dtype="float32")
    model, tokenizer = shipped.load(), shipped.tokenizer()
    calibration = StandardLibrary(64, 128).tokens(tokenizer)
    held_out = StandardLibrary(64, 128, split="validation").tokens(tokenizer)
    statistics = {one.info.index: one for one in collect(model, calibration.batches(BATCH_SIZE))}
    scores = {
        index: {metric: score(one) for metric, score in METRICS.items()}
        for index, one in statistics.items()
    }
    intact = held_out_loss(model, held_out)
    rows = []
    places = [(layer.info, e) for layer in moe_layers(model) for e in range(layer.info.num_experts)]
    for info, expert in progress(places, "leave one out"):
        kept = [other for other in range(info.num_experts) if other != expert]
        with restricted(model, {info.index: kept}):
            rise = held_out_loss(model, held_out) - intact
        row = {metric: score[expert].item() for metric, score in scores[info.index].items()}
        rows.append({"layer": info.index, "expert": expert, "loss_rise": rise} | row)
    return pd.DataFrame(rows)


def correlations(experts: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each criterion with the rise of the loss, by layer."""
    by_layer = {
        layer: part[list(METRICS)].corrwith(part["loss_rise"], method="spearman")
        for layer, part in experts.groupby("layer")
    }
    table = pd.DataFrame(by_layer).T.rename_axis("layer")
    spread = experts.groupby("layer")[["frequency", "soft_count", "loss_rise"]]
    unequal = spread.std(ddof=0) / spread.mean()
    table["unequal_counts"], table["unequal_rises"] = unequal["frequency"], unequal["loss_rise"]
    table.loc["mean"] = table.mean()
    return table


def main() -> None:
    """Print the correlations; write them and the experts beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_mixtral")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "single_experts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experts = measure(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    experts.to_csv(arguments.output / f"{arguments.model}.csv", index=False, float_format="%.6g")
    table = correlations(experts)
    print(table.round(2).to_string())
    whole = experts[list(METRICS)].corrwith(experts["loss_rise"], method="spearman")
    print(f"all layers together:\n{whole.round(2).to_string()}")


if __name__ == "__main__":
    main()
