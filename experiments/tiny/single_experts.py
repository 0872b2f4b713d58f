"""What each expert is worth alone, and how well each criterion guesses it.

    python experiments/tiny/single_experts.py [--model tiny_mixtral] [--output FOLDER]

Leaves out one expert of one layer at a time (exactly as pruning it would) and measures how much the
held-out loss of each domain of the embedded text rises, in nats per token. Then, layer by layer,
Spearman's rank correlation between each criterion's score on the calibration text and that rise:
weighted as the domains are mixed in that text, their plain mean, and each domain's.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from moe_lab.data import standard_library
from moe_lab.data.embedded import StandardLibrary
from moe_lab.data.tokens import Tokens
from moe_lab.finetune.tuning import next_token_loss
from moe_lab.methods.metrics.aimer import aimer
from moe_lab.methods.metrics.ean import ean
from moe_lab.methods.metrics.ean_mean import ean_mean
from moe_lab.methods.metrics.easy_ep import easy_ep
from moe_lab.methods.metrics.frequency import frequency
from moe_lab.methods.metrics.gate_sum import gate_sum
from moe_lab.methods.metrics.l1 import l1
from moe_lab.methods.metrics.leave_one_out import LeaveOneOut
from moe_lab.methods.metrics.max_activation import max_activation
from moe_lab.methods.metrics.mone import mone
from moe_lab.methods.metrics.msan import msan
from moe_lab.methods.metrics.random import random
from moe_lab.methods.metrics.reap import reap
from moe_lab.methods.metrics.router_norm import router_norm
from moe_lab.methods.metrics.soft_count import soft_count
from moe_lab.methods.metrics.weighted_ean import weighted_ean
from moe_lab.models import checkpoint
from moe_lab.models.layers import moe_layers
from moe_lab.models.routers import restricted
from moe_lab.models.stream import LayerStream
from moe_lab.profile.collect import collect_statistics
from moe_lab.profile.layer import LayerStatistics
from moe_lab.profile.profile import Profile
from moe_lab.progress import progress

FORMULAS = {
    metric.__name__: metric
    for metric in (
        frequency, soft_count, gate_sum, ean, ean_mean, weighted_ean, reap, msan, mone, easy_ep,
        max_activation, aimer, l1, router_norm,
    )
} | {"random": functools.partial(random, seed=0)}  # fmt: skip
METRICS = [*FORMULAS, "leave_one_out"]
RISES = ("mixture", "mean", *standard_library.DOMAINS)
BATCH_SIZE = 32


@torch.inference_mode()
def losses(model: torch.nn.Module, held_out: dict[str, Tokens]) -> pd.Series:
    """Nats per token of each domain."""
    return pd.Series(
        {
            domain: next_token_loss(model, tokens.labelled()).item() / tokens.num_targets
            for domain, tokens in held_out.items()
        }
    )


def scored(
    model: torch.nn.Module, statistics: list[LayerStatistics], batches: Sequence[dict[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """Every criterion's scores [E], by layer index."""
    profile = Profile(statistics, lambda num_samples: LayerStream(model, batches))
    left_out = LeaveOneOut(num_samples=None).scores(profile)
    return {
        one.info.index: {name: metric(one) for name, metric in FORMULAS.items()}
        | {"leave_one_out": exact}
        for one, exact in zip(statistics, left_out, strict=True)
    }


def measure(name: str) -> pd.DataFrame:
    """A row for each expert: the rise of the loss without it, and every criterion's score."""
    shipped = checkpoint.resolve(f"shipped:{name}", dtype="float32")
    model, tokenizer = shipped.load(), shipped.tokenizer()
    calibration = StandardLibrary(64, 128).tokens(tokenizer)
    held_out = {
        domain: StandardLibrary(16, 128, split="validation", domains=(domain,)).tokens(tokenizer)
        for domain in standard_library.DOMAINS
    }
    batches = calibration.batches(BATCH_SIZE)
    scores = scored(model, collect_statistics(model, batches), batches)
    intact = losses(model, held_out)
    rows = []
    places = [(layer.info, e) for layer in moe_layers(model) for e in range(layer.info.num_experts)]
    for info, expert in progress(places, "leave one out"):
        kept = [other for other in range(info.num_experts) if other != expert]
        with restricted(model, {info.index: kept}):
            rise = losses(model, held_out) - intact
        row = {metric: score[expert].item() for metric, score in scores[info.index].items()}
        rises = {
            "mixture": (rise * pd.Series(standard_library.MIXTURE)).sum(),
            "mean": rise.mean(),
        } | dict(rise)
        rows.append({"layer": info.index, "expert": expert} | row | rises)
    return pd.DataFrame(rows)


def correlations(experts: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each criterion with each rise, mean over layers."""
    parts = [
        pd.DataFrame(
            {rise: part[METRICS].corrwith(part[rise], method="spearman") for rise in RISES}
        )
        for _, part in experts.groupby("layer")
    ]
    return sum(parts) / len(parts)


def main() -> None:
    """Print the correlations; write a row for each expert beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_mixtral")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "single_experts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experts = measure(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    experts.to_csv(arguments.output / f"{arguments.model}.csv", index=False, float_format="%.6g")
    print("rank correlation with the rise of the loss, mean over layers")
    print(correlations(experts).round(2).to_string())


if __name__ == "__main__":
    main()
