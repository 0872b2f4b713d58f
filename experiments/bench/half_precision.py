"""What half precision costs on this machine's CPU, and what `model.dtype=auto` makes of it.

Rates of matrix products of an expert's shapes in each dtype, one thread; then CPU seconds of a
forward pass, and of CD-MoE's greedy searches of experts and layers (greedy_js), of one random model
that is stored in bfloat16, computed as stored and as `auto` chooses. Where the CPU has units for
bfloat16 the two are the same, and there is nothing to judge.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

SUPPORT = Path(__file__).resolve().parents[2] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from families import tiny_model  # noqa: E402

from moe_lab.compute import Compute  # noqa: E402
from moe_lab.methods.condense.method import Condense  # noqa: E402
from moe_lab.models.checkpoint import Checkpoint  # noqa: E402
from moe_lab.models.stream import LayerStream  # noqa: E402
from moe_lab.profile.collect import collect_statistics  # noqa: E402
from moe_lab.profile.profile import Profile  # noqa: E402
from moe_lab.stages.checks import in_quick_dtype  # noqa: E402

SHAPES = ((32, 2048, 768), (256, 1024, 1024), (2048, 512, 512))  # tokens, in, out
ROUNDS, SECONDS = 5, 0.2
SHAPE = dict(hidden_size=512, moe_intermediate_size=384, num_experts=32, num_hidden_layers=4)
SAMPLES, LENGTH = 8, 128
CONDENSED, ROUTED = 2, 4  # layers, and experts that stay in each
LIMIT = 0.5  # of what it takes as stored


def rate(dtype: torch.dtype, tokens: int, wide: int, out: int) -> float:
    """Thousand millions of operations in a CPU second."""
    left, right = torch.randn(tokens, wide).to(dtype), torch.randn(out, wide).to(dtype)
    left @ right.T
    started, done = time.process_time(), 0
    while time.process_time() - started < SECONDS:
        left @ right.T
        done += 1
    return 2e-9 * tokens * wide * out * done / (time.process_time() - started)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def judged(what: str, work: Callable[[int], object]) -> bool:
    """Whether work by the second model takes little enough of what it takes by the first."""
    taken = [[seconds(partial(work, which)) for which in (0, 1)] for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(quick / slow for slow, quick in taken)
    verdict = "PASS" if ratio <= LIMIT else "FAIL"
    print(f"{what}, as auto chooses against as stored: {ratio:.2f}, limit {LIMIT}: {verdict}")
    return ratio <= LIMIT


def main() -> int:
    """Print the rates and the ratio; 1 where what `auto` chose is no faster than the limit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for shape in SHAPES:
        rates = {
            dtype: statistics.median(rate(dtype, *shape) for _ in range(ROUNDS))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        told = ", ".join(f"{str(dtype)[6:]} {value:.0f}" for dtype, value in rates.items())
        print(f"{shape[0]} tokens x {shape[1]} x {shape[2]}: {told} GFLOP/s")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        tiny_model("qwen3_moe", **SHAPE).to(torch.bfloat16).save_pretrained(folder)
        stored = Checkpoint(Path(folder))
        chosen = in_quick_dtype(stored, stored.layers(), Compute("cpu").start())
        models = [checkpoint.load() for checkpoint in (stored, chosen)]
    print(f"stored in {models[0].dtype}, computed by model.dtype=auto in {models[1].dtype}")
    if models[0].dtype == models[1].dtype:
        return 0
    ids = torch.randint(0, models[0].config.vocab_size, (SAMPLES, LENGTH))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    sums = [collect_statistics(model, batches) for model in models]
    method = Condense(CONDENSED, ROUTED, "greedy_js", "greedy_js")

    def searched(which: int) -> object:
        stream = LayerStream(models[which], batches)
        return method.plan(Profile(sums[which], lambda: stream))

    with torch.inference_mode():
        passed = [
            judged("a forward", lambda which: models[which](ids)),
            judged("greedy_js of experts and layers", searched),
        ]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
