"""What counting costs: the routers' pass and the full pass, against a plain forward.

CPU time of this process with one thread, over the same tokens of the shipped models; the three
take turns, medians of the rounds. The plain forward computes only the last position's logits.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from profile_cost import batches_for, cpu_seconds
from transformers import PreTrainedModel

from moe_lab import checkpoint
from moe_lab.statistics import collect

LIMITS = {"routers": 1.1, "all": 2.0}
ROUNDS = 7
SHIPPED = Path(checkpoint.__file__).parent / "checkpoints"


def costs(model: PreTrainedModel) -> dict[str, float]:
    """Median CPU seconds of each kind of pass."""
    batches = batches_for(model)

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches:
            model(**batch, use_cache=False, logits_to_keep=1)

    passes = {
        "plain": plain,
        "routers": lambda: collect(model, batches, only_routers=True),
        "all": lambda: collect(model, batches),
    }
    for work in passes.values():
        work()
    rounds = [[cpu_seconds(work) for work in passes.values()] for _ in range(ROUNDS)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    return dict(zip(passes, medians, strict=True))


def main() -> int:
    """Measure every shipped model; 1 where a pass is over its limit."""
    torch.set_num_threads(1)
    failed = False
    for name in sorted(file.parent.name for file in SHIPPED.glob("*/config.json")):
        seconds = costs(checkpoint.resolve(f"shipped:{name}", dtype="float32").load())
        for kind, limit in LIMITS.items():
            ratio = seconds[kind] / seconds["plain"]
            failed |= ratio > limit
            print(
                f"compute.profile={kind}, {name}: {ratio:.2f}x of a plain forward "
                f"({seconds[kind]:.2f} s against {seconds['plain']:.2f} s CPU), limit {limit}x: "
                f"{'FAIL' if ratio > limit else 'PASS'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
