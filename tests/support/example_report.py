"""One report with figures of every kind."""

from __future__ import annotations

import math

REPORT = {
    "status": "ok",
    "model": "tiny_deepseek",
    "ratio": None,
    "seed": 0,
    "dense/parameters": 12_345_678,
    "dense/active_parameters": 999_990,
    "dense/bytes": 12_300_000,
    "dense/memory_ratio": 1.0,
    "dense/prefill_speedup": 1.0,
    "dense/stock": True,
    "dense/eval/code/acc_stderr": 0.02,
    "dense/eval/code/acc": 0.8125,
    "dense/eval/code/acc_norm": 0.75,
    "dense/eval/prose_perplexity/word_perplexity": 40.0,
    "dense/eval/prose_perplexity/bits_per_byte": 1.25,
    "dense/eval/average": 0.75,
    "compressed/parameters": 950,
    "compressed/bytes": 999,
    "compressed/memory_ratio": 0.85,
    "compressed/prefill_speedup": 1.2149,
    "compressed/kl": 0.01234,
    "compressed/stock": False,
    "compressed/eval/code/acc": 0.7,
    "compressed/eval/code/acc_norm": 0.625,
    "compressed/eval/prose_perplexity/bits_per_byte": math.nan,
    "compressed/eval/average": 0.7501,
    "seconds/profile": 12.34,
    "cached/profile": True,
    "seconds/evaluate/dense": 3.0,
    "cached/evaluate/dense": False,
}
