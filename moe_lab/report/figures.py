"""The figures of a report: their titles, how they are written, which way is better."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

DEFAULT_VALUES = (
    "dense/eval/average compressed/eval/average finetuned/eval/average compressed/kl finetuned/kl "
    "compressed/parameter_ratio compressed/memory_ratio compressed/prefill_speedup "
    "compressed/decode_speedup"
).split()
VARIANTS = ("dense", "compressed", "finetuned")
MISSING = "–"
TITLES = {
    "average": "average accuracy",
    "kl": "KL to dense",
    "active_parameters": "active parameters",
    "parameter_ratio": "parameters left",
    "flops_per_token": "FLOPs per token",
    "bytes": "size on disk",
    "bytes_ratio": "size on disk, of dense",
    "memory_ratio": "peak memory",
    "prefill_speedup": "prefill speed",
    "decode_speedup": "decode speed",
}
# A task may give several metrics; the first of these that it has stands for it.
MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "byte_perplexity")
SHARES = frozenset({"acc_norm", "acc", "exact_match", "f1"})  # 0 to 1, shown in percent
MORE_IS_BETTER = re.compile(rf"({'|'.join(SHARES)}|average|\w+_speedup)$")
LESS_IS_BETTER = re.compile(
    r"(kl|loss|\w*perplexity|bits_per_byte|parameters|active_parameters|parameter_ratio|"
    r"flops_per_token|bytes|bytes_ratio|peak_memory_bytes|memory_ratio|\w*seconds)$"
)


def main_metric(metrics: Iterable[str]) -> str:
    """The one metric that stands for a task: the first of MAIN_METRICS, else the first given."""
    given = list(metrics)
    return next((name for name in MAIN_METRICS if name in given), given[0])


def figure_text(key: str, value: Any) -> str:
    """One figure as text, by the last part of its key: 12.3 %, 1.20×, 3.9 M, 0.1352."""
    if finite(value) is None:
        return MISSING
    name = key.rpartition("/")[2]
    text = _percent(value) if name in SHARES else FORMATS.get(name, "{:.3f}".format)(value)
    return text if re.search("[1-9]", text) else text.removeprefix("-")


def better(key: str) -> int:
    """1 where more of a figure is better, -1 where less is, 0 where neither; by its last part."""
    name = "seconds" if key.startswith("seconds/") else key.rpartition("/")[2]
    return bool(MORE_IS_BETTER.match(name)) - bool(LESS_IS_BETTER.match(name))


def difference_text(key: str, value: float) -> str:
    """A difference of figures with its sign: points of a percentage, else as it is shown."""
    name = key.rpartition("/")[2]
    if name in SHARES or FORMATS.get(name) is _percent:
        return signed(100 * value)
    size = figure_text(key, abs(value))
    return size if size == figure_text(key, 0.0) else ("+" if value > 0 else "−") + size


def is_truth(key: str) -> bool:
    """Whether a figure is a yes or a no."""
    return FORMATS.get(key.rpartition("/")[2]) is _yes_or_no


def titles_of(key: str) -> tuple[str, str]:
    """A figure's variant and its name, for people: ("compressed", "KL to dense")."""
    variant, _, rest = key.partition("/")
    if not rest or variant.partition("_top_")[0] not in VARIANTS:
        return "", key
    task, _, metric = rest.removeprefix("eval/").rpartition("/")
    name = f"{task} {metric}" if task else TITLES.get(metric, metric)
    return variant.replace("_top_", " top-"), name


def finite(value: Any) -> Any:
    """The value, or None for NaN and infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def signed(points: float) -> str:
    """A difference with its sign, a typographic minus, and no sign on zero."""
    text = f"{points:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three or so digits and a thousands' prefix: 12.3 M."""
    power = 0
    while abs(value) >= 999.95 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.{1 if power else 0}f} {units[power]}".strip()


def _count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B", "T"))


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _yes_or_no(value: float) -> str:
    """Yes, no, or of several reports how many say yes."""
    words: dict[float, str] = {0: "no", 1: "yes"}
    return words.get(value) or f"{100 * value:.0f} % yes"


FORMATS: dict[str, Callable[[Any], str]] = {
    "average": _percent,
    "kl": "{:.4f}".format,
    "parameters": _count,
    "active_parameters": _count,
    "flops_per_token": _count,
    "top_k": "{:g}".format,
    "parameter_ratio": _percent,
    "bytes": _bytes,
    "bytes_ratio": _percent,
    "peak_memory_bytes": _bytes,
    "prefill_seconds": "{:.3f} s".format,
    "decode_seconds_per_token": "{:.3f} s".format,
    "memory_ratio": _percent,
    "prefill_speedup": "{:.2f}×".format,
    "decode_speedup": "{:.2f}×".format,
    "stock": _yes_or_no,
    "seconds": "{:.1f} s".format,
    "cached": _yes_or_no,
}
