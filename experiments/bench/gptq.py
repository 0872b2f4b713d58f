"""GPTQ of matrices of the size of a DeepSeekMoE-16B expert's, on one core.

Its up (and gate) projection, 1,408 x 2,048, and its down projection, 2,048 x 1,408, bfloat16, in
groups of 128 and in whole rows. Timed is all but the Hessian, whose cost is its tokens': it is
shown beside. CPU time of one thread, the median of some rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from moe_lab.models.rounding import Scheme
from moe_lab.quantize.column_rounding import HessianSum, LevelChoice, gptq

LIMIT = 2.0
SHAPES = {"up_proj": (1408, 2048), "down_proj": (2048, 1408)}
SCHEMES = {"4 bits, groups of 128": Scheme(4, 128), "3 bits, whole rows": Scheme(3)}
TOKENS = 2048


def main() -> int:
    """Measure each shape and scheme; 1 where one takes longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often (default 3)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    failed = False
    for name, (out, width) in SHAPES.items():
        drawn = torch.Generator().manual_seed(0)
        weight = torch.randn(out, width, generator=drawn).bfloat16()
        x = torch.randn(TOKENS, width, generator=drawn)
        started = time.thread_time()
        total = HessianSum()
        total.add(x)
        hessian_II = total.value()
        gram = time.thread_time() - started
        for words, scheme in SCHEMES.items():
            seconds = []
            for _ in range(rounds):
                started = time.thread_time()
                gptq(weight, hessian_II, LevelChoice(scheme))
                seconds.append(time.thread_time() - started)
            took = statistics.median(seconds)
            failed |= took > LIMIT
            print(
                f"GPTQ of {name} {out} x {width}, {words}: {took:.2f} s, limit {LIMIT} s: "
                f"{'FAIL' if took > LIMIT else 'PASS'} (its Hessian over {TOKENS} tokens: "
                f"{gram:.2f} s)",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
