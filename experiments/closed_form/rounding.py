"""What a plan costs with its float32 numbers, and with those of the checkpoint that was saved.

    python experiments/closed_form/rounding.py <run folder> [<run folder> ...]

The shipped models are stored in bfloat16, and so are the columns that a closed form finds: KL to
the intact model in nats per token on the embedded held-out text, with the plan carried out on the
intact model in float32, and with the saved checkpoint, computed in float32, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moe_lab.data.embedded import StandardLibrary
from moe_lab.data.tokens import Tokens
from moe_lab.models import checkpoint
from moe_lab.models.edits.plan import Plan, apply_plan
from moe_lab.models.predictions import divergence_terms, log_probabilities

BATCH_SIZE = 32


@torch.no_grad()
def divergence(intact: Any, model: Any, text: Tokens) -> float:
    """The mean over all positions but the last of each document."""
    total, number = 0.0, 0
    for batch in text.batches(BATCH_SIZE):
        chosen = batch["attention_mask"][:, 1:].bool()
        p, q = (
            log_probabilities(one(**batch).logits[:, :-1][chosen].float())
            for one in (intact, model)
        )
        total += float(divergence_terms(p, q).sum(dtype=torch.float64))
        number += len(p)
    return total / number


def main(folders: Sequence[str]) -> int:
    """One line a run."""
    for folder in map(Path, folders):
        report = json.loads((folder / "report.json").read_text())
        dense = checkpoint.resolve(report["dense/checkpoint"], dtype="float32")
        saved = checkpoint.resolve(report["compressed/checkpoint"], dtype="float32")
        text = StandardLibrary(64, 128, split="test").tokens(dense.tokenizer())
        intact, exact = dense.load(), dense.load()
        apply_plan(exact, Plan.load(folder / "plan.json"))
        here, there = (divergence(intact, one, text) for one in (exact, saved.load()))
        print(f"{folder}: KL {here:.6f} in float32, {there:.6f} saved: {there - here:+.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
